"""The planner's estimate of training memory next to the measured peak."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from llmtune.io.manifest import Manifest
from llmtune.reporting.numbers import finite


class PlanJson(TypedDict):
    """What report.json holds under `plan`."""

    estimated_bytes: int
    measured_bytes: int
    ratio: float
    components: dict[str, int]


@dataclass(frozen=True)
class PlanCheck:
    """Estimated and measured peak of training, in bytes."""

    estimated_bytes: int
    measured_bytes: int
    components: Mapping[str, int]

    @property
    def ratio(self) -> float:
        """Return estimate over measurement."""
        return self.estimated_bytes / self.measured_bytes

    def as_json(self) -> PlanJson:
        """Return what report.json holds under `plan`."""
        return {
            "estimated_bytes": self.estimated_bytes,
            "measured_bytes": self.measured_bytes,
            "ratio": self.ratio,
            "components": dict(self.components),
        }


class PlanSection(TypedDict):
    """What the template shows."""

    check: PlanCheck


def check_plan(manifest: Manifest) -> PlanCheck | None:
    """Return the comparison; None if the run has no estimate or no measured peak."""
    result = manifest.trained
    estimate = result.get("estimate") or {}
    estimated, measured = finite(estimate.get("total_bytes")), finite(result.get("peak_bytes"))
    if not estimated or not measured:
        return None
    return PlanCheck(int(estimated), int(measured), estimate["components"])


def show_plan(check: PlanCheck | None) -> PlanSection | None:
    """Return the section; None if there is nothing to compare."""
    return None if check is None else {"check": check}
