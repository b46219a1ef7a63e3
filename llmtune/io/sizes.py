"""Numbers of bytes in words, and two of them so that a reader can tell them apart."""

GIB = 1 << 30
MIB = 1 << 20


def write_size(size: float, *, more_digits: int = 0) -> str:
    """Write a number of bytes as `3.71 GiB`, or below that as `120 MiB`."""
    if size >= GIB:
        return f"{size / GIB:.{2 + more_digits}f} GiB"
    return f"{size / MIB:.{more_digits}f} MiB"


def write_apart(one: float, other: float) -> tuple[str, str]:
    """Write two numbers of whole bytes, with more digits where unequal ones would read the same."""
    more_digits = 0
    while True:
        texts = write_size(one, more_digits=more_digits), write_size(other, more_digits=more_digits)
        if texts[0] != texts[1] or int(one) == int(other):
            return texts
        more_digits += 1
