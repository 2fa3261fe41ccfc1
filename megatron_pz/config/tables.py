"""Nested tables, as TOML gives them, made into a `Config`; every fault of a file is named at once.

1. A table that `to_tables` wrote reads back equal.
2. An unknown section or key is an error that names the nearest one, or the section where the key does stand.
3. A value of another type is an error that names file, section, key, value and wanted type; an int is taken for a float.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from megatron_pz.config.schema import Config
from megatron_pz.errors import ConfigError

PASS_THROUGH = ("transformer", "optimizer", "ddp", "server")
"""Sections whose keys are Megatron-Core's or SGLang's own; which keys exist is known there."""

SECTIONS: dict[str, Any] = {
    field.name: field.default_factory  # which, of a section, is its class
    for field in dataclasses.fields(Config)
    if field.name not in PASS_THROUGH
}
"""Section name to its dataclass, in the order of `Config`."""


def section_of(key: str) -> str | None:
    """The section in which field `key` stands; None where there is no such field."""
    return next((name for name, cls in SECTIONS.items() if key in cls.__dataclass_fields__), None)


ALIASES = {
    "learning_rate": "lr",
    "learning-rate": "lr",
    "max_steps": "train_iters",
    "batch_size": "paragraphs_per_step",
}
"""What other trainers call a setting."""


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that is most like `name`.

    >>> nearest("temperatur", ["top_p", "temperature"])
    'temperature'
    """
    names = list(names)
    if name in ALIASES and ALIASES[name] in names:
        return ALIASES[name]
    return difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]


def from_tables(tables: Mapping[str, Any], source: str) -> Config:
    """The `Config` that `tables` describe; what they leave out keeps its default.

    Args:
        tables: section name to table of field values.
        source: what to call the tables in messages, e.g. the path of their file.

    Raises:
        ConfigError: an unknown section or key, or a value of the wrong type; all of them, one a line.
    """
    faults: list[str] = []
    sections: dict[str, Any] = {}
    for name, table in tables.items():
        if name not in SECTIONS and name not in PASS_THROUGH:
            faults.append(f"{source}: {_unknown_section(name)}")
        elif not isinstance(table, Mapping):
            faults.append(f"{source}: {name} is {table!r}; it must be a section: `[{name}]` on a line, its keys below.")
        elif name in PASS_THROUGH:
            sections[name] = dict(table)
        else:
            values = {key: _value(source, name, key, value, faults) for key, value in table.items()}
            if not faults:
                sections[name] = SECTIONS[name](**values)
    if faults:
        raise ConfigError("\n".join(faults))
    return Config(**sections)


def to_tables(config: Config) -> dict[str, dict[str, Any]]:
    """Every setting of `config` by section and name, defaults included; empty pass-through tables are left out."""
    tables = {name: dataclasses.asdict(getattr(config, name)) for name in SECTIONS}
    return tables | {name: dict(table) for name in PASS_THROUGH if (table := getattr(config, name))}


def _unknown_section(name: str) -> str:
    home = section_of(name)
    if home is not None:
        return f"{name} stands outside its section; put it under `[{home}]`."
    return f"no section [{name}]; the nearest is [{nearest(name, [*SECTIONS, *PASS_THROUGH])}]."


def _value(source: str, section: str, key: str, value: Any, faults: list[str]) -> Any:
    """`value` as the field wants it; what is wrong with it is added to `faults`."""
    cls: Any = SECTIONS[section]
    if key not in cls.__dataclass_fields__:
        home = section_of(key)
        way_out = f"it stands in [{home}]" if home else f"the nearest is {nearest(key, cls.__dataclass_fields__)}"
        faults.append(f"{source}: no setting {section}.{key}; {way_out}.")
        return value
    wanted = typing.get_type_hints(cls)[key]
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(wanted) is Literal:
        choices = typing.get_args(wanted)
        if value not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            faults.append(f"{source}: {section}.{key} is {value!r}; it must be one of {listed}.")
    elif type(value) is not wanted:
        found = type(value).__name__
        faults.append(f"{source}: {section}.{key} is {value!r}, a {found}; it must be a {wanted.__name__}.")
    return value


def check_passed_through(cls: type, table: str, values: Mapping[str, Any], owned: Mapping[str, str]) -> None:
    """Pass if each of `values` may be handed on to Megatron's record `cls`. Dtypes may stand as their names.

    Args:
        table: the pass-through table that holds them.
        owned: fields that another section sets, with that section's name.

    Raises:
        ConfigError: a name is no field of `cls`, or is owned, or its value is not of the field's type.
    """
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for name, value in values.items():
        if name in owned:
            raise ConfigError(f"{table}.{name} is set by [{owned[name]}]; set it there.")
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{table}.{name} is no field of Megatron-Core's {cls.__name__}{hint}")
        if "dtype" not in name:
            _check_plain_type(f"{table}.{name}", value, fields[name])


def _check_plain_type(name: str, value: Any, annotation: object) -> None:
    """Pass if `value` may stand for a field of Megatron's records; one whose annotation is no plain type always may.

    Raises:
        ConfigError: names the field, the value and the wanted type.
    """
    text = getattr(annotation, "__name__", str(annotation))
    plain = text.removeprefix("typing.").removeprefix("Optional[").removesuffix("]")
    allowed = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}.get(plain)
    if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and plain != "bool")):
        raise ConfigError(f"{name} is {value!r}, a {type(value).__name__}; it must be a {plain}.")
