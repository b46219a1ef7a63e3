"""Numbers of bytes in words, and two of them so that a reader can tell them apart."""

from typing import Literal

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
UNIT_STEP = 1024
MIB = UNIT_STEP**2
GIB = UNIT_STEP**3


def format_in(size: float, unit: Literal["MiB", "GiB"], *, digits: int = 1) -> str:
    """Format a number of bytes in one unit, as `0.4 GiB`."""
    return f"{size / UNIT_STEP ** UNITS.index(unit):.{digits}f} {unit}"


def format_bytes(size: float, *, digits: int = 1) -> str:
    """Format a number of bytes in the largest unit that leaves 1 or more of it, as `3.7 GiB`."""
    value = float(size)
    for unit in UNITS:
        if value < UNIT_STEP or unit == UNITS[-1]:
            break
        value /= UNIT_STEP
    return f"{value:.{0 if unit == UNITS[0] else digits}f} {unit}"


def format_size(size: float, *, more_digits: int = 0) -> str:
    """Format a number of bytes as `3.71 GiB`, or below that as `120 MiB`."""
    if size >= GIB:
        return format_in(size, "GiB", digits=2 + more_digits)
    return format_in(size, "MiB", digits=more_digits)


def format_apart(one: float, other: float) -> tuple[str, str]:
    """Format two numbers of whole bytes, with more digits if unequal ones would read the same."""
    more_digits = 0
    while True:
        first, second = (format_size(size, more_digits=more_digits) for size in (one, other))
        if first != second or int(one) == int(other):
            return first, second
        more_digits += 1
