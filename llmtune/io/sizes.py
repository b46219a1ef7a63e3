"""Numbers of bytes in words, and two of them so that a reader can tell them apart."""

GIB = 1 << 30
MIB = 1 << 20


def format_size(size: float, *, more_digits: int = 0) -> str:
    """Format a number of bytes as `3.71 GiB`, or below that as `120 MiB`."""
    if size >= GIB:
        return f"{size / GIB:.{2 + more_digits}f} GiB"
    return f"{size / MIB:.{more_digits}f} MiB"


def format_apart(one: float, other: float) -> tuple[str, str]:
    """Format two numbers of whole bytes, with more digits if unequal ones would read the same."""
    more_digits = 0
    while True:
        first, second = (format_size(size, more_digits=more_digits) for size in (one, other))
        if first != second or int(one) == int(other):
            return first, second
        more_digits += 1
