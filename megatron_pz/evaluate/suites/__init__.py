"""The paper's test sets: their published formats, how each is asked and which average it enters."""
