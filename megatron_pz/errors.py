"""The errors that a user can do something about.

    MegatronPZError
    ├── VersionError       Python or a package outside of the supported range
    ├── ConfigError        a field, a file of settings, or a combination of them
    │   └── LayoutError    parallel sizes that do not divide
    ├── CorpusError        text that cannot be read or used
    ├── TokenizerError     a tokenizer that is missing or does not match the model
    ├── TemplateError      a prompt template without its placeholder
    ├── ModelError         a model family, a weight name or a shape that is not as expected
    ├── EngineError        generation
    ├── CheckpointError    a checkpoint or a run directory, damaged or foreign
    ├── DiskError          no room, or no right, to write
    ├── ReportError        a metric that no table knows, a run directory that cannot be shown
    └── NumericsError      a loss or a gradient that is not finite

A message names the thing, what was found, what was wanted and the way out. `assert` is for our own mistakes.
"""

import shlex
import sys

GRACE_S = 20.0
"""What the ranks that found the same fault give the first one to say it: torchrun ends all with the first that leaves."""


def pip_install(*requirements: str) -> str:
    """The command that installs `requirements` into the environment that this runs in."""
    return shlex.join([sys.executable, "-m", "pip", "install", *requirements])


class MegatronPZError(Exception):
    """Root of every error that this package raises for its users."""


class VersionError(MegatronPZError):
    """Python or a package is missing, older or newer than what is supported."""


class ConfigError(MegatronPZError, ValueError):
    """A setting is unknown, malformed or contradicts another."""


class LayoutError(ConfigError):
    """A parallel size does not divide what it must divide."""


class CorpusError(MegatronPZError):
    """Text cannot be read, or there is too little of it."""


class TokenizerError(MegatronPZError):
    """A tokenizer is missing, unreadable or does not match the model."""


class TemplateError(MegatronPZError):
    """A prompt template lacks its placeholder."""


class ModelError(MegatronPZError):
    """A model folder, weight name or shape is not what the family expects."""


class EngineError(MegatronPZError):
    """Generation failed."""


class CheckpointError(MegatronPZError):
    """A checkpoint or run directory is damaged, incomplete or foreign."""


class DiskError(MegatronPZError, OSError):
    """There is no room, or no right, to write."""


class ReportError(MegatronPZError, ValueError):
    """A metric has no row in the table, or there is no run to show."""


class NumericsError(MegatronPZError, ArithmeticError):
    """A loss or a gradient is not finite."""
