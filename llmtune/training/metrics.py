"""The metrics of a run as they happen: a file of JSON lines, and one line on the screen."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from llmtune.io.json_files import parse_json
from llmtune.io.listening import tell_hearers
from llmtune.io.progress import draw_bar, format_times
from llmtune.io.sizes import format_in
from llmtune.training.memory.measure import peak_bytes
from llmtune.training.request import RunTotals

# Between lines on a screen that cannot renew them (a file, a pipe).
SECONDS_BETWEEN_LINES = 5.0
MIN_QUARTER = 4
CLEAR_FALL = 0.02


class MetricsLog:
    """Appends lines to `metrics.jsonl`; every line is on disk before the next step starts."""

    def __init__(
        self,
        path: Path,
        *,
        resumed_step: int,
        without_evaluation: bool = False,
        screen: "ProgressLine | None" = None,
        total_steps: int = 0,
    ) -> None:
        """Open the file, dropping what was written after `resumed_step` (0 drops everything).

        Args:
            resumed_step: the step that the run continues after.
            without_evaluation: drop that step's evaluation too: it is made up.
            screen: shows every line too.
            total_steps: of the run, for the screen.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [
            line
            for line in _read_lines(path)
            if line["step"] < resumed_step + ("eval_loss" not in line or not without_evaluation)
        ]
        # Half a line is what a killed run leaves; the whole ones before it are kept.
        temporary = path.with_name(f".{path.name}.kept")
        temporary.write_text("".join(_format(line) for line in kept), encoding="utf-8")
        temporary.replace(path)
        self.path = path
        self._file = path.open("a", encoding="utf-8")
        self._screen = screen
        self._total_steps = total_steps

    def write(self, line: dict[str, Any], *, seconds_left: float = 0.0) -> None:
        """Append one line; a number that is not finite is written as null."""
        self._file.write(_format(line))
        self._file.flush()
        tell_hearers(line)
        if self._screen is not None:
            self._screen.update({**line, "seconds_left": seconds_left}, self._total_steps)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(parse_json(text))
        except ValueError:
            break
    return lines


def _format(line: dict[str, Any]) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in line.items()
    }
    return json.dumps(finite) + "\n"


class ProgressLine:
    """Shows the run on standard error: renewed in place in a terminal, line by line elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._live: Live | None = None
        self._last = -math.inf

    def note(self, text: str) -> None:
        """Say something that stays on the screen."""
        self._console.print(text, soft_wrap=True, markup=False)

    def update(self, line: dict[str, Any], total_steps: int) -> None:
        """Show the newest line of metrics."""
        text = format_metrics(line, total_steps)
        if not self._console.is_terminal:
            now = time.monotonic()
            is_last = line["step"] == total_steps
            if "eval_loss" in line or is_last or now - self._last >= SECONDS_BETWEEN_LINES:
                self.note(text)
                self._last = now
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        shown = f"{draw_bar(line['step'], total_steps)} {text}"
        self._live.update(Text(shown, no_wrap=True, overflow="ellipsis"), refresh=True)

    def stop(self) -> None:
        """Leave the last line on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def format_metrics(line: dict[str, Any], total_steps: int) -> str:
    """Return one readable line of a step's or an evaluation's metrics."""
    step = f"step {line['step']}/{total_steps}"
    if "eval_loss" in line:
        return f"{step}  evaluation loss {line['eval_loss']:.4f}"
    return "  ".join(
        (
            step,
            f"loss {line['loss']:.4f}",
            f"lr {line['learning_rate']:.2e}",
            f"{line['tokens_per_second']:,.0f} tokens/s",
            f"peak {format_in(line['peak_bytes'], 'GiB')}",
            format_times(line["seconds"], line["seconds_left"]),
        )
    )


@dataclass(frozen=True)
class RowsSeen:
    """How much of the rows a training has read."""

    rows: int
    seen: int
    is_loss_falling: bool


def count_rows(metrics_path: Path, num_rows: int, num_seen: int) -> RowsSeen:
    """Say how much of the rows was seen, and whether the loss was still falling at the end."""
    losses = [line["loss"] for line in _read_lines(metrics_path) if line.get("loss") is not None]
    return RowsSeen(num_rows, min(num_rows, num_seen), is_falling(losses))


def is_falling(losses: Sequence[float]) -> bool:
    """Whether the last quarter of some losses is clearly below the quarter before it."""
    size = len(losses) // 4
    if size < MIN_QUARTER:
        return False
    before, last = (median(part) for part in (losses[-2 * size : -size], losses[-size:]))
    return last < before * (1 - CLEAR_FALL)


class Clock:
    """Adds up the seconds of a run, and its speed without evaluations and saves."""

    def __init__(self, totals: RunTotals) -> None:
        self._totals = totals
        self.seconds_a_step = 0.0
        """Of the steps since the last line of metrics."""
        self.start(0)

    def start(self, step: int) -> None:
        """Start counting time and speed here, after `step`."""
        self._started = time.perf_counter()
        self._step = step
        self._tokens = self._totals.tokens
        self._aside_seconds = 0.0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keep what is not training out of the speed."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._aside_seconds += time.perf_counter() - started

    def measure(self, step: int, device: torch.device) -> dict[str, float]:
        """Return totals, speed since the last line, and peak memory; start over after `step`."""
        now = time.perf_counter()
        totals = self._totals
        seconds = now - self._started - self._aside_seconds
        totals.seconds += now - self._started
        self.seconds_a_step = seconds / max(step - self._step, 1)
        measured = {
            "tokens": totals.tokens,
            "trained_tokens": totals.trained_tokens,
            "tokens_per_second": (totals.tokens - self._tokens) / max(seconds, 1e-9),
            "seconds": totals.seconds,
            "peak_bytes": peak_bytes(device),
        }
        self.start(step)
        return measured

    def stop(self, step: int) -> None:
        """Add the time since the last line of metrics to the total."""
        self._totals.seconds += time.perf_counter() - self._started
        self.start(step)
