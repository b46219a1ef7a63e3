"""Tasks learned in sequence, as `llmtune sequence` left them next to a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import read_json
from llmtune.io.run_dir import SEQUENCE_FILE, RunDir
from llmtune.reporting.numbers import FRACTION, Unit

KEYS = ("tasks", "runs", "adapters", "matrix", "untrained")


class SequenceJson(TypedDict):
    """The sequence as its file and report.json hold it."""

    tasks: list[str]
    runs: list[str]
    adapters: list[str]
    matrix: list[list[float]]
    untrained: list[float]
    ACC: float
    BWT: float
    FWT: float


@dataclass(frozen=True)
class SequenceResult:
    """Scores after every task, and what they say about keeping and preparing.

    `matrix[t][j]` is the score on task j after training on task t (both from 0), `untrained[j]`
    the base's; each is the mean over the task's target suites. `runs` are the names of the tasks'
    run directories, `adapters` the fingerprints of what each left. Formulas as in GEM
    (arXiv:1706.08840), with T tasks:
    `accuracy` = mean_j R[T-1][j], `backward_transfer` = mean over j < T-1 of R[T-1][j] - R[j][j]
    (below 0: forgotten), `forward_transfer` = mean over j > 0 of R[j-1][j] - untrained[j].
    """

    tasks: tuple[str, ...]
    matrix: tuple[tuple[float, ...], ...]
    untrained: tuple[float, ...]
    runs: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """Mean score over the tasks at the end."""
        return _mean(self.matrix[-1])

    @property
    def backward_transfer(self) -> float:
        """What earlier tasks gained since they were learned; below 0: forgotten."""
        last = self.matrix[-1]
        return _mean([last[j] - self.matrix[j][j] for j in range(len(self.tasks) - 1)])

    @property
    def forward_transfer(self) -> float:
        """What later tasks gained before they were learned."""
        later = range(1, len(self.tasks))
        return _mean([self.matrix[j - 1][j] - self.untrained[j] for j in later])

    def as_json(self) -> SequenceJson:
        """Return the sequence as its file and report.json hold it."""
        return {
            "tasks": list(self.tasks),
            "runs": list(self.runs),
            "adapters": list(self.adapters),
            "matrix": [list(row) for row in self.matrix],
            "untrained": list(self.untrained),
            "ACC": self.accuracy,
            "BWT": self.backward_transfer,
            "FWT": self.forward_transfer,
        }


def read_sequence(directory: Path) -> SequenceResult | None:
    """Read `sequence.json` in a directory; None if there is none.

    Raises:
        LlmtuneError: the file is damaged, or an older version wrote it.
    """
    path = directory / SEQUENCE_FILE
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        return _parse(values)
    except (LlmtuneError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise LlmtuneError(
            f"{path}: not written by llmtune sequence of this version (expected "
            f"{', '.join(KEYS)}; {type(error).__name__}: {error}); run the same llmtune "
            "sequence command again, finished runs are skipped"
        ) from None


def find_sequence(run: RunDir, adapter: str | None) -> SequenceResult | None:
    """Return the sequence that a run is a step of, if its adapter is still the one of then."""
    place = run.path.resolve()
    found = read_sequence(place.parent)
    if found is None or place.name not in found.runs:
        return None
    return found if found.adapters[found.runs.index(place.name)] == adapter else None


class SequenceSection(TypedDict):
    """What the template shows."""

    sequence: SequenceResult
    unit: Unit


def show_sequence(found: SequenceResult | None) -> SequenceSection | None:
    """Return the accuracy matrix with its three numbers."""
    return {"sequence": found, "unit": FRACTION} if found else None


def _parse(values: Mapping[str, Any]) -> SequenceResult:
    tasks, runs, adapters = (tuple(map(str, values[key])) for key in KEYS[:3])
    matrix = tuple(tuple(map(float, row)) for row in values["matrix"])
    untrained = tuple(map(float, values["untrained"]))
    sizes = {len(tasks), len(runs), len(adapters), len(matrix), len(untrained), *map(len, matrix)}
    if len(sizes) > 1 or len(tasks) < 2:
        raise ValueError(f"{len(tasks)} tasks, and lists of {sorted(sizes)} entries")
    return SequenceResult(tasks, matrix, untrained, runs, adapters)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
