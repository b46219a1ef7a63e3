"""The report as a value: everything that report.json, the page and the terminal show."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llmtune.evaluation.compare import Resampling
from llmtune.manifest import Manifest
from llmtune.reporting.numbers import without_nan
from llmtune.reporting.sources import Generation, LossCurve
from llmtune.reporting.suites import SuiteReport
from llmtune.reporting.verdict import Thresholds, Verdict

FORMAT = 1


@dataclass(frozen=True)
class Cost:
    """What the run took: seconds and peak bytes per stage, tokens of training, bytes on disk.

    `peak_bytes` is resident memory of the process; `training_gpu_peak_bytes` what training
    allocated on a GPU, None where it ran on the CPU.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    training_gpu_peak_bytes: int | None = None
    steps: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    tokens_per_second: float | None = None
    adapter_bytes: int | None = None
    merged_bytes: int | None = None

    @property
    def total_seconds(self) -> float | None:
        """Return the sum over the stages that were timed, or None where none was."""
        return sum(self.seconds.values()) if self.seconds else None

    @property
    def largest_peak_bytes(self) -> int | None:
        """Return the largest peak over the stages, or None where none was measured."""
        return max(self.peak_bytes.values(), default=None)


@dataclass(frozen=True)
class Report:
    """A run's outcome. `merge` is the merge stage's own result, as its room wrote it."""

    name: str
    verdict: Verdict
    caveats: tuple[str, ...]
    suites: tuple[SuiteReport, ...]
    manifest: Manifest
    curve: LossCurve = field(default_factory=LossCurve)
    generations: tuple[Generation, ...] = ()
    cost: Cost = field(default_factory=Cost)
    merge: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    resampling: Resampling = field(default_factory=Resampling)
    thresholds: Thresholds = field(default_factory=Thresholds)

    def as_json(self) -> dict[str, Any]:
        """Return what report.json holds; what was not measured is null or absent, never 0."""
        seconds = dict.fromkeys(("train", "merge", "evaluate")) | dict(self.cost.seconds)
        values = {
            "format": FORMAT,
            "run": self.name,
            "created": self.manifest.created,
            "verdict": self.verdict.name,
            "decided_by": self.verdict.as_json(),
            "caveats": list(self.caveats),
            "missing": list(self.missing),
            "suites": {suite.name: suite.as_json() for suite in self.suites},
            "statistics": asdict(self.resampling) | {"thresholds": asdict(self.thresholds)},
            "seconds": seconds | {"total": self.cost.total_seconds},
            "peak_bytes": self.cost.largest_peak_bytes,
            "cost": {
                "peak_bytes": dict(self.cost.peak_bytes),
                "training_gpu_peak_bytes": self.cost.training_gpu_peak_bytes,
                "steps": self.cost.steps,
                "tokens": self.cost.tokens,
                "trained_tokens": self.cost.trained_tokens,
                "tokens_per_second": self.cost.tokens_per_second,
                "adapter_bytes": self.cost.adapter_bytes,
                "merged_bytes": self.cost.merged_bytes,
            },
            "loss": {
                "train": [list(point) for point in self.curve.train],
                "evaluation": [list(point) for point in self.curve.evaluation],
            },
            "generations": [asdict(each) for each in self.generations],
            "merge": self.merge,
            "data": self.manifest.data,
            "base": self.manifest.base,
            "config": self.manifest.config,
            "fingerprints": dict(self.fingerprints),
            "machine": self.manifest.machine,
            "versions": self.manifest.versions,
        }
        return without_nan(values)
