"""Checks of arguments that many functions share."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import QakdError


def positive_whole(name: str, value: int | None, *, none: bool = False) -> None:
    """Require a positive whole number.

    Args:
        name: of the argument, as the message shows it.
        value: what was passed.
        none: whether None is allowed as well.

    Raises:
        QakdError: it is something else.
    """
    if value is None and none:
        return
    if not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        raise QakdError(f"{name}={value!r} must be a positive whole number{' or None' if none else ''}.")


def not_negative(name: str, value: float | None) -> None:
    """Require a number that is not negative, or None.

    Raises:
        QakdError: it is something else.
    """
    if value is not None and not holds(lambda: value >= 0):
        raise QakdError(f"{name}={value!r} must be a number, and not negative.")


def holds(comparison: Callable[[], bool]) -> bool:
    """Whether it does; what cannot be compared with numbers, as text, does not."""
    try:
        return bool(comparison())
    except (TypeError, ValueError):
        return False
