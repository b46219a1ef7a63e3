"""What one measured process is asked, and what it answers."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

RANK = 16
ALPHA = 32


@dataclass(frozen=True)
class Job:
    """One arm on one setting, run in a process of its own."""

    arm: str
    model_dir: str
    mix: str
    quantization: str
    device: str
    batch_size: int
    full_length: int
    warm_up: int
    steps: int
    """Timed ones, after the warm-up."""
    gradients_file: str | None = None
    """Where to save every step's gradients (safetensors); the adapter then stays as it is."""

    @property
    def num_rows(self) -> int:
        return (self.warm_up + self.steps) * self.batch_size

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class StepReduction:
    """What adding up one step's gradients took the first process."""

    seconds: float
    """Without the time for which it waited for the others to be done with their rows."""
    waiting_seconds: float
    num_bytes: int
    """Of what was added up."""


@dataclass(frozen=True)
class Times:
    """What the steps of a process took, one entry a step."""

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    """Of all threads: other work on the machine makes them only a little longer."""
    moved_bytes: list[int] = field(default_factory=list)
    """Over the loopback, by all processes and whatever else runs on the machine."""


@dataclass(frozen=True)
class Answer:
    """What a process measured; lists have one entry a step, the warm-up included."""

    times: Times
    step_tokens: list[int]
    """Without padding."""
    losses: list[float]
    base_bytes: int
    peak_bytes: int
    choices: dict[str, str] = field(default_factory=dict)
    reductions: list["StepReduction"] = field(default_factory=list)
    """Of llmtune's arms in several processes."""

    @staticmethod
    def read(path: Path) -> "Answer":
        values = json.loads(path.read_text())
        values["times"] = Times(**values["times"])
        values["reductions"] = [StepReduction(**one) for one in values["reductions"]]
        return Answer(**values)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))
