"""What the diagnoses of a run found, as far as they are of the models that lie there now."""

from dataclasses import dataclass, fields
from typing import Any

from pydantic import TypeAdapter

from llmtune.evaluation.diagnosis.results import (
    ContaminationResult,
    Diagnostic,
    DivergenceResult,
    LearningCurveResult,
    MemorisationResult,
    ProbeResult,
    ShiftResult,
    StopsResult,
    read_diagnostic,
)
from llmtune.io.run_dir import RunDir


@dataclass(frozen=True)
class Diagnostics:
    """Each diagnosis that was made; None where it was not, or where its models have changed."""

    contamination: ContaminationResult | None = None
    divergence: DivergenceResult | None = None
    stops: StopsResult | None = None
    shift: ShiftResult | None = None
    memorisation: MemorisationResult | None = None
    probe: ProbeResult | None = None
    learning_curve: LearningCurveResult | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """What each diagnosis took, by its name."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: made.seconds for name, made in found.items() if made is not None}

    def as_json(self) -> dict[str, Any]:
        """Return every diagnosis as its file holds it, None where it was not made."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            name: TypeAdapter(type(made)).dump_python(made, mode="json") if made else None
            for name, made in found.items()
        }


KINDS: dict[str, type[Diagnostic]] = {
    "contamination": ContaminationResult,
    "divergence": DivergenceResult,
    "stops": StopsResult,
    "shift": ShiftResult,
    "memorisation": MemorisationResult,
    "probe": ProbeResult,
    "learning_curve": LearningCurveResult,
}


def read_diagnostics(run: RunDir, *, base: str | None, adapter: str | None) -> Diagnostics:
    """Read what lies in the run's `diagnostics/`, without what was measured on other models.

    Args:
        base, adapter: fingerprints of the models that lie there now.

    Raises:
        LlmtuneError: a file is damaged or of another version.
    """
    found = {name: read_diagnostic(kind, run.diagnostics_dir) for name, kind in KINDS.items()}
    current = {
        name: made
        for name, made in found.items()
        if made and made.is_of(base=base, adapter=adapter)
    }
    return Diagnostics(**current)  # type: ignore[arg-type]
