"""Whole-or-absent checkpoints that any layout loads, Hugging Face import and export, and the journal of a round that was cut short."""
