"""What is played or read in a step: PretrainZero and the paper's baselines, `sft`, `rlvr`. They know engines by a function only."""
