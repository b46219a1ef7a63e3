"""How far long work is: a bar in a terminal, a line every few seconds elsewhere; on stderr."""

import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO, TypeVar

log = logging.getLogger("llmtune")

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_DRAWINGS = 0.1
CELLS = 20
ERASE_LINE = "\r\x1b[2K"

Thing = TypeVar("Thing")


class MessageHandler(logging.StreamHandler[TextIO]):
    """Writes the package's messages to stderr, above the bar if one is drawn."""

    def __init__(self, stream: TextIO, *, draws_bars: bool) -> None:
        super().__init__(stream)
        self.draws_bars = draws_bars and stream.isatty()
        self._drawn = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        drawn = self._drawn
        self.erase()
        super().emit(record)
        if drawn:
            self.draw(drawn)

    def draw(self, text: str) -> None:
        """Draw the bar's line in place of the last one, cut at the terminal's width."""
        self._drawn = text
        width = shutil.get_terminal_size().columns - 1
        self.stream.write(ERASE_LINE + text[:width])
        self.stream.flush()

    def erase(self) -> None:
        """Take the bar's line away."""
        if self._drawn:
            self._drawn = ""
            self.stream.write(ERASE_LINE)
            self.stream.flush()


class ProgressBar:
    """Shows how much of something is done, for how long it has run, and how long it will take.

    Nothing is shown of work that ends within the time between two lines, but for its bar.
    """

    def __init__(self, what: str, total: int | None = None, *, unit: str = "items") -> None:
        self._what, self._total, self._unit = what, total, unit
        self._handler = next(
            (each for each in log.handlers if isinstance(each, MessageHandler) and each.draws_bars),
            None,
        )
        self._started = self._last = time.monotonic()
        self._from: int | None = None
        self.done = 0

    def update(self, done: int) -> None:
        """Show that so many are done."""
        self.done = done
        now = time.monotonic()
        if self._from is None:  # what an earlier call did says nothing about the pace
            self._from = done
        wait = SECONDS_BETWEEN_LINES if self._handler is None else SECONDS_BETWEEN_DRAWINGS
        if now - self._last < wait or not log.isEnabledFor(logging.INFO):
            return
        self._last = now
        if self._handler is None:
            log.info("%s", self.line())
        else:
            self._handler.draw(self.line(with_bar=True))

    def advance(self, count: int = 1) -> None:
        """Show that so many more are done."""
        if self._from is None:
            self._from = 0
        self.update(self.done + count)

    def line(self, *, with_bar: bool = False) -> str:
        """Return what is shown, as `data: 40 of 100 rows, 0:02, left 0:03`."""
        elapsed = time.monotonic() - self._started
        unit = f" {self._unit}" if self._unit else ""
        if not self._total:
            return f"{self._what}: {self.done:,}{unit}, {format_seconds(elapsed)}"
        said = f"{self._what}: {self.done:,} of {self._total:,}{unit}, "
        made = self.done - (self._from or 0)
        left = elapsed / made * (self._total - self.done) if made > 0 else None
        bar = f"{draw_bar(self.done, self._total)} " if with_bar else ""
        return bar + said + format_times(elapsed, left)

    def close(self) -> None:
        """Take the bar away."""
        if self._handler is not None:
            self._handler.erase()


@contextmanager
def progress_bar(
    what: str, total: int | None = None, *, unit: str = "items"
) -> Iterator[ProgressBar]:
    """Show a bar while something lasts."""
    bar = ProgressBar(what, total, unit=unit)
    try:
        yield bar
    finally:
        bar.close()


def iter_with_bar(things: Sequence[Thing], what: str, *, unit: str = "items") -> Iterator[Thing]:
    """Yield the things and show how many are done."""
    with progress_bar(what, len(things), unit=unit) as bar:
        for each in things:
            yield each
            bar.advance()


def draw_bar(done: int, total: int) -> str:
    """Return a bar of a fixed width, with the share in percent."""
    share = min(done / total, 1.0) if total else 1.0
    full = int(share * CELLS)
    return f"[{'#' * full}{'-' * (CELLS - full)}] {int(100 * share):3d} %"


def format_times(elapsed: float, left: float | None) -> str:
    """Return how long something has run and how long it will still take."""
    gone = format_seconds(elapsed)
    return gone if left is None else f"{gone}, left {format_seconds(left)}"


def format_seconds(seconds: float) -> str:
    """Return a duration as 1:05 or 2:03:20."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
