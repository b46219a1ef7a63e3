"""The run's metrics file: one JSON object a line, written as it happens."""

import json
import math
from pathlib import Path


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
