"""Everything that depends on the machine. Nowhere else is asked whether CUDA exists."""
