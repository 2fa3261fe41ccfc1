"""megatron_pz: PretrainZero (arXiv 2512.03442) on Megatron-Core. Importing this package loads nothing heavy."""

__version__ = "0.1.0"
