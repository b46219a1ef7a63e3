"""The report as a value: everything that report.json, the page and the terminal show."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TypedDict

from llmtune.evaluation.stats import Resampling
from llmtune.io.manifest import Manifest, MergeRecord
from llmtune.reporting.diagnostics import Diagnostics
from llmtune.reporting.missing import Missing
from llmtune.reporting.numbers import without_nan
from llmtune.reporting.sections.generations import Generation
from llmtune.reporting.sections.plan import PlanJson, check_plan
from llmtune.reporting.sections.probabilities import ProbabilityShift, ShiftJson
from llmtune.reporting.sections.seeds import SeedStudy
from llmtune.reporting.sections.sequence import SequenceJson, SequenceResult
from llmtune.reporting.sections.strengths import StrengthSweep, SweepJson
from llmtune.reporting.sections.training import TIMED_STAGES, Cost, CurveJson, LossCurve
from llmtune.reporting.suites import SuiteJson, SuiteReport, Thresholds, describe_compared
from llmtune.reporting.verdict.outcome import Verdict, VerdictJson

FORMAT = 1
TRAINING_NOISE = "not measured (one training seed)"
WITH_TRAINING_NOISE = "in the intervals"


class ReportJson(TypedDict):
    """What report.json holds; what was not measured is null or absent, never 0."""

    format: int
    run: str
    created: str
    compared: str
    verdict: str
    decided_by: VerdictJson
    caveats: list[str]
    missing: list[str]
    how_to_measure: dict[str, str | None]
    suites: dict[str, SuiteJson]
    strengths: SweepJson | None
    diagnostics: Mapping[str, object]
    sequence: SequenceJson | None
    seeds: Mapping[str, object] | None
    probability_shifts: dict[str, ShiftJson]
    statistics: Mapping[str, object]
    seconds: dict[str, float | None]
    peak_bytes: int | None
    cost: Mapping[str, object]
    plan: PlanJson | None
    loss: CurveJson
    generations: list[Mapping[str, object]]
    merge: Mapping[str, object]
    data: Mapping[str, object]
    base: Mapping[str, object]
    config: Mapping[str, object]
    fingerprints: dict[str, str]
    machine: Mapping[str, object]
    versions: Mapping[str, object]


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
    merge: MergeRecord = field(default_factory=lambda: MergeRecord())
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[Missing, ...] = ()
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    strengths: StrengthSweep | None = None
    shifts: tuple[ProbabilityShift, ...] = ()
    sequence: SequenceResult | None = None
    seeds: SeedStudy | None = None
    """Over which trainings this is the joint report; None for that of one run."""
    resampling: Resampling = field(default_factory=Resampling)
    thresholds: Thresholds = field(default_factory=Thresholds)

    @property
    def compared(self) -> str:
        """What was compared with what, in a sentence; empty if nothing was."""
        return describe_compared(self.suites, self.manifest.base.get("quantization"))

    def with_role(self, role: str) -> tuple[SuiteReport, ...]:
        """Return the suites of a role, in their order."""
        return tuple(suite for suite in self.suites if suite.role == role)

    def as_json(self) -> ReportJson:
        """Return what report.json holds; what was not measured is null or absent, never 0."""
        seconds: dict[str, float | None] = dict.fromkeys(TIMED_STAGES)
        plan = check_plan(self.manifest)
        values: ReportJson = {
            "format": FORMAT,
            "run": self.name,
            "created": self.manifest.created,
            "compared": self.compared,
            "verdict": self.verdict.name,
            "decided_by": self.verdict.as_json(),
            "caveats": list(self.caveats),
            "missing": [missing.name for missing in self.missing],
            "how_to_measure": {missing.name: missing.command for missing in self.missing},
            "suites": {suite.name: suite.as_json() for suite in self.suites},
            "strengths": self.strengths.as_json() if self.strengths else None,
            "diagnostics": self.diagnostics.as_json(),
            "sequence": self.sequence.as_json() if self.sequence else None,
            "seeds": self.seeds.as_json() if self.seeds else None,
            "probability_shifts": {shift.suite: shift.as_json() for shift in self.shifts},
            "statistics": {
                **asdict(self.resampling),
                "thresholds": asdict(self.thresholds),
                "training_noise": WITH_TRAINING_NOISE if self.seeds else TRAINING_NOISE,
            },
            "seconds": {**seconds, **self.cost.seconds, "total": self.cost.total_seconds},
            "peak_bytes": self.cost.largest_peak_bytes,
            "cost": self.cost.as_json(),
            "plan": plan.as_json() if plan else None,
            "loss": self.curve.as_json(),
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
