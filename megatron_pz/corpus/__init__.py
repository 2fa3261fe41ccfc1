"""Text: reading, cleaning and storing paragraphs, their order in a run, and the tokenizers."""
