"""A run's settings: read from a TOML file, overridden on the command line, written back as TOML.

    CONFIG.toml -> tables -> Config -> flags -> Config

Rules that tie settings together are in `config.rules`; `load_config` does not apply them, for they ask for the number
of ranks.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from megatron_pz.config.command_line import PROG, override, print_help
from megatron_pz.config.schema import Config
from megatron_pz.config.tables import from_tables, to_tables
from megatron_pz.errors import ConfigError


def load_config(argv: Sequence[str]) -> Config:
    """The settings of `CONFIG.toml [--flag value ...]`.

    Args:
        argv: the arguments after the program's name: the path of a TOML file, then flags.

    Raises:
        ConfigError: no file, a file that is not TOML, an unknown name or a value of the wrong type.
        SystemExit: `--help` was among the arguments; the help has been printed.
    """
    if any(argument in ("-h", "--help") for argument in argv):
        print_help()
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        found = f"found {argv[0]}" if argv else "found nothing"
        raise ConfigError(
            f"The first argument must be a TOML file, {found}. Usage: {PROG} CONFIG.toml [--flag value ...]"
        )
    return override(read_config(Path(argv[0])), argv[1:])


def read_config(path: Path) -> Config:
    """The settings in the TOML file at `path`; what it leaves out is as in its `base`, or keeps its default.

    `base = "other.toml"`, at the top, names a file whose tables this one adds to, key by key; seen from this file's folder.

    Raises:
        ConfigError: the file or its base is missing, not TOML, or holds an unknown name or a value of the wrong type.
    """
    return from_tables(_read_tables(path, ()), str(path))


def _read_tables(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The tables of the file at `path`, on top of its base's. `above`: the files whose base it is."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Name a TOML file; examples/ has some.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    base = tables.pop("base", None)
    if base is None:
        return tables
    if not isinstance(base, str):
        raise ConfigError(f'{path}: base is {base!r}; it must be the name of a TOML file, e.g. base = "other.toml".')
    files, below = (*above, path.resolve()), path.parent / base
    if below.resolve() in files:
        raise ConfigError(f"{path}: base is {base!r}, which has this file for its own base. Take one of the two out.")
    merged = _read_tables(below, files)
    from_tables(merged, str(below))  # its faults are told under its own name
    for name, table in tables.items():
        known = merged.get(name)
        merged[name] = {**known, **table} if isinstance(known, dict) and isinstance(table, dict) else table
    return merged


def to_toml(config: Config) -> str:
    """`config` as TOML, every setting spelled out; `read_config` reads it back equal."""
    return tomli_w.dumps(to_tables(config))
