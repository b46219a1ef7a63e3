"""The metrics of a run as they happen: a file of JSON lines, and one line on the screen."""

import json
import math
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

# Between lines on a screen that cannot renew them (a file, a pipe).
SECONDS_BETWEEN_LINES = 5.0


class MetricsLog:
    """Appends lines to `metrics.jsonl`; every line is on disk before the next step starts."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Open the file, dropping what was written after `resumed_step` (0 drops everything)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _read_lines(path) if line["step"] <= resumed_step]
        # Half a line is what a killed run leaves; the whole ones before it are kept.
        temporary = path.with_name(f".{path.name}.kept")
        temporary.write_text("".join(_format(line) for line in kept), encoding="utf-8")
        temporary.replace(path)
        self.path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, float]) -> None:
        """Append one line; a number that is not finite is written as null."""
        self._file.write(_format(line))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _read_lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _format(line: dict) -> str:
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

    def update(self, line: dict[str, float], total_steps: int) -> None:
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
        self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def stop(self) -> None:
        """Leave the last line on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def format_metrics(line: dict[str, float], total_steps: int) -> str:
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
            f"peak {line['peak_bytes'] / 2**30:.1f} GiB",
            f"left {format_seconds(line['seconds_left'])}",
        )
    )


def format_seconds(seconds: float) -> str:
    """Return a duration as 1:05 or 2:03:20."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
