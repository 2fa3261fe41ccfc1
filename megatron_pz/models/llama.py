"""Llama: the plain decoder."""

from __future__ import annotations

from megatron_pz.models.family import ATTENTION, MLP, Family, HfConfig, decoder_fields, model_entries
from megatron_pz.models.names import Entry


def names(hf: HfConfig) -> tuple[Entry, ...]:
    """The name table of Llama."""
    return (*model_entries(hf), *ATTENTION, *MLP)


FAMILY = Family("llama", decoder_fields, names)
