"""Are two answers the same, by the library math-verify. May take long; `judge.Judge` ends it."""

from __future__ import annotations

from megatron_pz.errors import ConfigError, pip_install

TAIL_CHARS = 3000


def equal(answer: str, target: str) -> bool:
    r"""Whether math-verify finds `target` in `answer`.

    Args:
        answer: a text with the answer in it, best in a `\boxed{}`.
        target: the answer alone.

    Raises:
        ConfigError: the library is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError(
            f"The package math-verify is not installed, which grades mathematics here: {pip_install('megatron_pz[evaluate]')}"
        ) from error
    # Its own time limits are off (alarms work in one thread only): the judge's process is ended from outside.
    wanted = parse(f"\\boxed{{{target}}}", parsing_timeout=None, raise_on_error=False)
    found = parse(answer[-TAIL_CHARS:], parsing_timeout=None, raise_on_error=False)
    return bool(verify(wanted, found, timeout_seconds=None, raise_on_error=False))
