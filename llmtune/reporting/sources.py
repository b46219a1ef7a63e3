"""Reading a run directory: the loss over the steps, the example generations, sizes on disk."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.run_dir import RunDir
from llmtune.reporting.numbers import finite

WEIGHT_FILES = "*.safetensors"


@dataclass(frozen=True)
class LossCurve:
    """(step, nats/token) of training and of evaluation during training, in step order.

    `kl_to_base` is the live gauge of forgetting where `protect` is on, nats/token on replay text.
    """

    train: tuple[tuple[float, float], ...] = ()
    evaluation: tuple[tuple[float, float], ...] = ()
    kl_to_base: tuple[tuple[float, float], ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.train and not self.evaluation

    def as_json(self) -> dict[str, list[list[float]]]:
        """Return the points of each curve as report.json holds them."""
        return {
            "train": [list(point) for point in self.train],
            "evaluation": [list(point) for point in self.evaluation],
            "kl_to_base": [list(point) for point in self.kl_to_base],
        }


@dataclass(frozen=True)
class Generation:
    """One prompt answered by both models; `stopped` says whether the model ended by itself."""

    prompt: str
    base: str
    tuned: str
    reference: str | None = None
    base_stopped: bool | None = None
    tuned_stopped: bool | None = None


def read_loss_curve(path: Path) -> LossCurve:
    """Read metrics.jsonl; a step written twice (after a resume) counts with its last value.

    Raises:
        LlmtuneError: a line in the middle of the file is not JSON.
    """
    train: dict[float, float] = {}
    evaluation: dict[float, float] = {}
    kl_to_base: dict[float, float] = {}
    places = (("loss", train), ("eval_loss", evaluation), ("kl_to_base", kl_to_base))
    for record in _iter_records(path):
        step = finite(record.get("step"))
        for key, points in places:
            loss = finite(record.get(key))
            if step is not None and loss is not None:
                points[step] = loss
    return LossCurve(*(tuple(sorted(points.items())) for _, points in places))


def read_generations(run: RunDir) -> tuple[Generation, ...]:
    """Read generations.json; none where the run has not made it.

    Raises:
        LlmtuneError: the file is not the list of examples it should be.
    """
    path = run.generations_path
    if not path.exists():
        return ()
    known = Generation.__dataclass_fields__
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return tuple(Generation(**{k: v for k, v in row.items() if k in known}) for row in rows)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise LlmtuneError(
            f"{path}: expected a list of {{prompt, base, tuned, reference}}, but: {error}; "
            "evaluate the run again to rewrite it"
        ) from None


def weights_bytes(directory: Path) -> int | None:
    """Return the bytes of a directory's safetensors files, or None where there are none."""
    sizes = [file.stat().st_size for file in directory.glob(WEIGHT_FILES)]
    return sum(sizes) if sizes else None


def _iter_records(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield a JSONL file's objects; a last line cut off by a crash is left out."""
    if not path.exists():
        return
    # str.splitlines would also cut at U+2028 and U+0085, which JSON strings may hold.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                return
            raise LlmtuneError(
                f"{path}:{number}: not JSON; the log of the run is damaged"
            ) from None
        if isinstance(record, Mapping):
            yield record
