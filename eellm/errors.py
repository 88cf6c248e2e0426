"""Exceptions of the native core and of missing packages, and the one form of all messages."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eellm._core import BusyError, CommError, Error, NonFiniteError

__all__ = [
    "BusyError",
    "CommError",
    "Error",
    "MissingPackageError",
    "NonFiniteError",
    "Shown",
    "check_integer",
    "check_one_of",
    "invalid",
    "message",
    "missing_package",
]


def __getattr__(name: str) -> Any:
    if name in ("BusyError", "CommError", "Error", "NonFiniteError"):
        from eellm import _core

        return getattr(_core, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class MissingPackageError(ValueError, ImportError):
    """An optional package is needed and not installed."""


def message(what: str, expected: object, got: object, advice: str = "") -> str:
    """Returns "WHAT (expected ..., got ...); ADVICE"."""
    return f"{what} (expected {expected}, got {got})" + (f"; {advice}" if advice else "")


def missing_package(purpose: str, package: str) -> MissingPackageError:
    """The error of a missing optional package, with the command that installs it."""
    what = f"{purpose} needs the package {package}"
    return MissingPackageError(
        message(what, "it installed", "no such module", f"run: pip install {package}")
    )


def invalid(what: str, expected: str, got: object, advice: str = "") -> ValueError:
    """A ValueError: what is wrong (expected ..., got ...); what to do."""
    shown = got if isinstance(got, Shown) else repr(got)
    if len(shown) > 200:
        shown = shown[:197] + "..."
    return ValueError(message(what, expected, shown, advice))


class Shown(str):
    """Text that a message shows as it is, without quotes."""


def check_one_of(key: str, value: object, choices: Sequence[object]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if not any(value is choice or value == choice for choice in choices):
        raise invalid(f"{key} is invalid", f"one of {', '.join(map(str, choices))}", value)


def check_integer(key: str, value: object, low: int, high: int, advice: str = "") -> None:
    """Raises ValueError unless the value is an integer from low to high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise invalid(f"{key} is invalid", f"an integer from {low} to {high}", value, advice)
