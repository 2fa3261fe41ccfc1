"""Scores: fixed random masks during a run, and the paper's test sets with intervals."""
