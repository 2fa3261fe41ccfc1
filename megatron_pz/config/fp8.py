"""FP8 by blocks in the words of config.json, for those who write such weights and for servers that are to hold them."""

from __future__ import annotations

from typing import Any

BLOCK = 128
"""Rows, and columns, that share a scale."""

QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""`quantization_config` of a folder whose weights are so."""
