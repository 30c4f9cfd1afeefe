"""Typed errors: each names the argument, the value that was given, and the remedy."""

from __future__ import annotations

import contextlib
import importlib
import operator
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch


class ReDiFError(Exception):
    """Base class of every error that ReDiF raises on purpose."""


class InvalidArgumentError(ReDiFError, ValueError):
    """An argument is of the wrong kind, shape or range.

    Args:
        argument: Name of the argument, as its caller wrote it.
        value: What was given. Only its `repr`, cut to 200 characters, is kept.
        remedy: What to pass instead, as a full sentence.
    """

    def __init__(self, argument: str, value: object, remedy: str) -> None:
        self.argument = argument
        self.value = _shorten(repr(value))
        self.remedy = remedy
        super().__init__(f"{argument}={self.value}: {remedy}")


class InvalidActionError(InvalidArgumentError):
    """An action holds NaN or infinity, lies outside the Box, or has the wrong shape or dtype."""


class InvalidRewardError(InvalidArgumentError):
    """A reward returned something other than one finite number a row."""


class RemoteRewardError(InvalidArgumentError, OSError):
    """A scoring server could not be reached, or answered with something else than scores."""


class RewardModelError(InvalidArgumentError):
    """The network of a reward is missing, damaged or of another kind."""


class TeacherFolderError(InvalidArgumentError):
    """A teacher's folder is missing, incomplete, corrupt, or of an unsupported kind."""


class CacheError(ReDiFError, OSError):
    """The teacher bank could not be written to its cache."""


class LostProcessError(ReDiFError, RuntimeError):
    """Another process of the run has ended, or has not answered in time.

    Args:
        task: What the processes were doing together.
        rank: This process.
        cause: What torch says.
    """

    def __init__(self, task: str, rank: int, cause: str) -> None:
        super().__init__(
            f"process {rank} could not {task} with the others: one has ended or does not answer. "
            "Look for its own error above or in its log; then start all again, from the last "
            f"checkpoint if there is one. torch says: {cause}"
        )


class MissingExtraError(ReDiFError, ImportError):
    """An optional dependency is not installed.

    Args:
        package: Name of the package that could not be imported.
        extra: Name of the extra of `redif` that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: {install_command(extra)}")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """For command lines: inside, an error of ReDiF prints its message alone, and exits with 2."""
    try:
        yield
    except ReDiFError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def install_command(extra: str) -> str:
    """How an extra of `redif` is installed: from a checkout, for no index has it yet."""
    checkout = f"pip install -e '.[{extra}]' in ReDiF's folder"
    return f"{checkout}, or pip install redif[{extra}] from an index"


def require(package: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        package: Name to import.
        extra: The extra of `redif` that installs it.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingExtraError(package, extra) from error


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_integer(argument: str, value: object, minimum: int) -> int:
    """Return `value` as an int; raise `InvalidArgumentError` unless it is an integer >= minimum."""
    try:
        integer = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        integer = None
    if integer is None or integer < minimum:
        raise InvalidArgumentError(argument, value, f"pass an integer of at least {minimum}.")
    return integer


def check_number(
    argument: str, value: object, minimum: float = 0.0, maximum: float = float("inf")
) -> float:
    """Return `value` as a finite float in [minimum, maximum], or raise `InvalidArgumentError`."""
    try:  # not of text: callers may go on with the value as they were given it
        number = float("nan") if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = float("nan")
    if not minimum <= number <= maximum or number == float("inf"):
        upper = "" if maximum == float("inf") else f" and at most {maximum:g}"
        raise InvalidArgumentError(
            argument, value, f"pass a finite number of at least {minimum:g}{upper}."
        )
    return number


def check_flag(argument: str, value: object) -> bool:
    """Return `value`; raise `InvalidArgumentError` unless it is True or False."""
    if not isinstance(value, bool | np.bool_):  # an array has no truth
        raise InvalidArgumentError(argument, value, "pass True or False.")
    return bool(value)


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> str:
    """Return `value`; raise `InvalidArgumentError` unless it is one of `choices`."""
    # An array compares element by element, and has no truth.
    if not isinstance(value, str) or value not in choices:
        raise InvalidArgumentError(argument, value, f"pass one of {', '.join(map(repr, choices))}.")
    return value


def check_device(device: object) -> torch.device:
    """Return `device`; raise `InvalidArgumentError` unless torch has it here."""
    try:
        checked = torch.device(device)  # type: ignore[call-overload]
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise InvalidArgumentError(
            "device", device, f"pass a device that torch has here, such as 'cpu' ({error})."
        ) from error
    return checked
