"""What a run took: time and memory by stage and by measure, and when training pays for itself."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llmtune.evaluation.compare import arm_kind
from llmtune.evaluation.results import ArmResult
from llmtune.io.manifest import Manifest
from llmtune.io.run_dir import RunDir
from llmtune.reporting.arms import FEW_SHOT
from llmtune.reporting.diagnostics import Diagnostics
from llmtune.reporting.numbers import finite
from llmtune.reporting.sources import weights_bytes

TIMED_STAGES = ("train", "merge", "evaluate")
TRAIN_TOKEN_COST = 2.4
"""Forward passes that training one token costs with LoRA on every linear layer (measured)."""


@dataclass(frozen=True)
class BreakEven:
    """After how many requests training has cost less than carrying the demonstrations along.

    `requests_by_tokens` counts tokens: 2.4 x tokens read in training / demonstration tokens.
    `requests_by_time` divides the seconds of training by the seconds that the demonstrations added
    to a request here, where their keys and values are computed once for all; None where they added
    none.
    """

    demonstration_tokens: float
    requests_by_tokens: float
    requests_by_time: float | None = None


@dataclass(frozen=True)
class Cost:
    """What the run took: seconds and peak bytes per stage, tokens of training, bytes on disk.

    `measures` are the seconds of each measurement, by arm and diagnosis. `peak_bytes` is resident
    memory of the process; `training_gpu_peak_bytes` what training allocated on a GPU, None where it
    ran on the CPU.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)
    training_gpu_peak_bytes: int | None = None
    steps: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    tokens_per_second: float | None = None
    adapter_bytes: int | None = None
    merged_bytes: int | None = None
    break_even: BreakEven | None = None

    @property
    def total_seconds(self) -> float | None:
        """Return the sum over the stages that were timed, or None where none was."""
        return sum(self.seconds.values()) if self.seconds else None

    @property
    def largest_peak_bytes(self) -> int | None:
        """Return the largest peak over the stages, or None where none was measured."""
        return max(self.peak_bytes.values(), default=None)

    def as_json(self) -> dict[str, Any]:
        """Return what report.json holds under `cost`."""
        values = asdict(self)
        del values["seconds"]
        return values


def measure_cost(
    run: RunDir,
    manifest: Manifest,
    results: Mapping[str, Mapping[str, ArmResult]],
    diagnostics: Diagnostics,
) -> Cost:
    """Gather what the manifest, the results and the files say of time, memory and size."""
    training = manifest.stages.get("train", {}).get("result") or {}
    tokens, train_seconds = finite(training.get("tokens")), finite(training.get("seconds"))
    return Cost(
        seconds=_of_stages(manifest, "seconds"),
        measures=_seconds_by_measure(results) | diagnostics.seconds,
        peak_bytes={name: int(size) for name, size in _of_stages(manifest, "peak_bytes").items()},
        training_gpu_peak_bytes=_gpu_peak(training),
        steps=training.get("steps"),
        tokens=training.get("tokens"),
        trained_tokens=training.get("trained_tokens"),
        tokens_per_second=tokens / train_seconds if tokens and train_seconds else None,
        adapter_bytes=weights_bytes(run.adapter_dir),
        merged_bytes=weights_bytes(run.merged_dir),
        break_even=_break_even(results, tokens, train_seconds),
    )


def _seconds_by_measure(results: Mapping[str, Mapping[str, ArmResult]]) -> dict[str, float]:
    """Return the seconds of each kind of arm over all suites; the mean of draws costs nothing."""
    seconds: dict[str, float] = {}
    for arms in results.values():
        for name, result in arms.items():
            if name != FEW_SHOT:
                kind = arm_kind(name)
                seconds[kind] = seconds.get(kind, 0.0) + result.seconds
    return seconds


def _break_even(
    results: Mapping[str, Mapping[str, ArmResult]],
    tokens: float | None,
    train_seconds: float | None,
) -> BreakEven | None:
    """Return the break-even on the first target suite that has few-shot draws."""
    for arms in results.values():
        pooled, base = arms.get(FEW_SHOT), arms.get("base")
        shown = finite(pooled.about.get("demonstration_tokens")) if pooled else None
        if pooled is None or pooled.role != "target" or not shown or not tokens:
            continue
        by_time = None
        if base is not None and train_seconds:
            draws = max(1, len(pooled.about.get("draws") or ()))
            added = pooled.seconds / draws / pooled.n - base.seconds / base.n
            by_time = train_seconds / added if added > 0 else None
        return BreakEven(shown, TRAIN_TOKEN_COST * tokens / shown, by_time)
    return None


def _gpu_peak(training: Mapping[str, Any]) -> int | None:
    peak = finite(training.get("peak_bytes"))
    on_gpu = str(training.get("device", "")).startswith("cuda")
    return int(peak) if on_gpu and peak is not None else None


def _of_stages(manifest: Manifest, key: str) -> dict[str, float]:
    found = {name: finite(manifest.stages.get(name, {}).get(key)) for name in TIMED_STAGES}
    return {name: value for name, value in found.items() if value is not None}
