"""Families: config.json to Megatron's model, and one name table for import, export, weight sync and conversion."""
