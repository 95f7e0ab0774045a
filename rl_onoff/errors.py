"""The errors a user may meet. Each message is one sentence: the cause, then the override that fixes it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class OnOffError(Exception):
    """Base of all errors that are printed as one sentence, without a traceback; `exit_code` ends the process."""

    exit_code = 1


def named(error: BaseException) -> tuple[str, str]:
    """An exception as it travels between processes: its class here (EngineError for any other class), and its text."""
    if not isinstance(error, OnOffError):
        return "EngineError", f"{type(error).__name__}: {error}"
    return next(c.__name__ for c in type(error).__mro__ if c.__module__ == OnOffError.__module__), str(error)


class UsageError(OnOffError, ValueError):
    """The command line, the config or the input data is wrong; nothing was computed."""

    exit_code = 2


class MetricError(UsageError):
    """What a sweeper shall optimise is not a number of its runs: trying more of them is in vain."""


class NotComparableError(OnOffError):
    """The numbers of two policies mean nothing beside each other; everything is written, the reason too."""

    exit_code = 3


class GateError(OnOffError):
    """A metric is beyond `compare.fail_above`, or experiment=acceptance failed; everything is written."""

    exit_code = 4


class EngineError(OnOffError, RuntimeError):
    """The engine could not do what it was asked (load, generate, score)."""


class EngineDiedError(EngineError):
    """An engine's process, or a child of it, ended; `in_flight`: the (request id, sample) that had not come back."""

    def __init__(self, message: str, in_flight: tuple[tuple[str, int], ...] = ()):
        super().__init__(message)
        self.in_flight = in_flight


class MissingDependencyError(OnOffError, ImportError):
    """A package that an engine or a feature needs is not installed; the message names the extra that brings it."""

    exit_code = 2


def one_line(error: BaseException) -> str:
    """What an exception says, as a part of a sentence."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def plural(count: int, noun: str) -> str:
    """A count with its noun, of which there may be one."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def at_least(least: float, name: str, value: float | None, example: object) -> None:
    """UsageError when the option of this name is set to a number below `least`, or to no number."""
    if value is not None and not value >= least:
        raise UsageError(f"{name} is {value} but must be at least {least}: set {name}={example}")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that was probably meant, whatever its case; None when none is near."""
    by_lower = {other.lower(): other for other in known}
    near = get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[near[0]] if near else None
