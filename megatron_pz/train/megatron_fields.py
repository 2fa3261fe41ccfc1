"""Megatron's own config records, made from our settings and a pass-through table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_pz.config.tables import check_passed_through
from megatron_pz.errors import ConfigError
from megatron_pz.platform.base import DTYPES


def megatron_record(
    cls: type,
    table: str,
    overrides: Mapping[str, Any],
    *,
    ours: Mapping[str, Any],
    owned: Mapping[str, tuple[str, Any]],
) -> Any:
    """A `cls` with `ours` and `owned`, the pass-through table on top of `ours`.

    Names of dtypes ("bfloat16") stand for torch's dtypes where the record wants one.

    Args:
        cls: Megatron's dataclass.
        table: name of the pass-through table, for messages.
        overrides: the table.
        ours: values that the table may replace.
        owned: values that it may not, each with the section that sets it.

    Raises:
        ConfigError: a name is no field of `cls`, or is owned, or Megatron refuses the values.
    """
    check_passed_through(cls, table, overrides, {name: section for name, (section, _) in owned.items()})
    values = {**ours, **overrides, **{name: value for name, (_, value) in owned.items()}}
    values = {name: _dtype(value) if "dtype" in name else value for name, value in values.items()}
    try:
        return cls(**values)
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"Megatron-Core refuses [{table}]: {error or type(error).__name__}.") from error


def _dtype(value: Any) -> Any:
    return DTYPES.get(value, value) if isinstance(value, str) else value
