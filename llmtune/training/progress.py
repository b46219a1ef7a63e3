"""What a person sees of the training: one line that renews itself, on standard error."""

import math
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

# Where lines cannot renew themselves (a file, a pipe).
SECONDS_BETWEEN_LINES = 5.0


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
        """Leave the last line standing."""
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
