"""The loss over the steps, the gauge of forgetting, and what everything cost."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from markupsafe import Markup
from matplotlib.axes import Axes

from llmtune.errors import LlmtuneError
from llmtune.evaluation.compare import arm_kind
from llmtune.evaluation.diagnosis.config import ALTERNATIVES
from llmtune.evaluation.main_arms import MAIN_ARMS, OTHER
from llmtune.evaluation.results import ArmResult
from llmtune.io.fingerprint import JsonObject
from llmtune.io.json_files import parse_json
from llmtune.io.manifest import Manifest
from llmtune.io.run_dir import RunDir
from llmtune.reporting.charts import BASE, GOOD, OPEN, PAPER, Points, draw, finish_axes, thin_points
from llmtune.reporting.facts import Fact, format_label
from llmtune.reporting.numbers import finite, format_bytes, format_count
from llmtune.reporting.sections.arms import FEW_SHOT, split_name

TIMED_STAGES = ("train", "merge", "evaluate")
TRAIN_TOKEN_COST = 2.4
"""Forward passes that training one token costs with LoRA on every linear layer (measured)."""
MEASURE_LABELS = {
    "few-shot": "few-shot draws",
    "strength": "other strengths",
    "prompt": "own prompts",
}


class CurveJson(TypedDict):
    """The points of each curve, as report.json holds them."""

    train: list[list[float]]
    evaluation: list[list[float]]
    kl_to_base: list[list[float]]


@dataclass(frozen=True)
class LossCurve:
    """(step, nats/token) of training and of evaluation during training, in step order.

    `kl_to_base` is the live gauge of forgetting if `protect` is on, nats/token on replay text.
    """

    train: tuple[tuple[float, float], ...] = ()
    evaluation: tuple[tuple[float, float], ...] = ()
    kl_to_base: tuple[tuple[float, float], ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was logged."""
        return not self.train and not self.evaluation

    def as_json(self) -> CurveJson:
        """Return the points of each curve as report.json holds them."""
        return {
            "train": [list(point) for point in self.train],
            "evaluation": [list(point) for point in self.evaluation],
            "kl_to_base": [list(point) for point in self.kl_to_base],
        }


@dataclass(frozen=True)
class BreakEven:
    """After how many requests training has cost less than carrying the demonstrations along.

    `requests_by_tokens` counts tokens: 2.4 x tokens read in training / demonstration tokens.
    `requests_by_time` divides the seconds of training by the seconds that the demonstrations added
    to a request here, with their keys and values computed once for all; None if they added
    none.
    """

    demonstration_tokens: float
    requests_by_tokens: float
    requests_by_time: float | None = None


@dataclass(frozen=True)
class Cost:
    """What the run took: seconds and peak bytes per stage, tokens of training, bytes on disk.

    `measures` are the seconds of each measurement, by arm and diagnosis. `peak_bytes` is resident
    memory of the process; `training_gpu_peak_bytes` what training allocated on a GPU, None if it
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
        """Return the sum over the stages that were timed, or None if none was."""
        return sum(self.seconds.values()) if self.seconds else None

    @property
    def largest_peak_bytes(self) -> int | None:
        """Return the largest peak over the stages, or None if none was measured."""
        return max(self.peak_bytes.values(), default=None)

    def as_json(self) -> JsonObject:
        """Return what report.json holds under `cost`."""
        values = asdict(self)
        del values["seconds"]
        return values


class TrainingSection(TypedDict):
    """What the template shows; `measures` are (label, seconds)."""

    curve: Markup | None
    gauge: Markup | None
    facts: tuple[Fact, ...]
    measures: list[tuple[str, float]]
    break_even: BreakEven | None


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


def measure_cost(
    run: RunDir,
    manifest: Manifest,
    results: Mapping[str, Mapping[str, ArmResult]],
    diagnosis_seconds: Mapping[str, float],
) -> Cost:
    """Gather what the manifest, the results and the files say of time, memory and size."""
    training = manifest.trained
    tokens, train_seconds = finite(training.get("tokens")), finite(training.get("seconds"))
    return Cost(
        seconds=_of_stages(manifest, "seconds"),
        measures={**_seconds_by_measure(results), **diagnosis_seconds},
        peak_bytes={name: int(size) for name, size in _of_stages(manifest, "peak_bytes").items()},
        training_gpu_peak_bytes=_gpu_peak(training),
        steps=training.get("steps"),
        tokens=training.get("tokens"),
        trained_tokens=training.get("trained_tokens"),
        tokens_per_second=tokens / train_seconds if tokens and train_seconds else None,
        adapter_bytes=_weights_bytes(run.adapter_dir),
        merged_bytes=_weights_bytes(run.merged_dir),
        break_even=_break_even(results, tokens, train_seconds),
    )


def show_training(curve: LossCurve, cost: Cost) -> TrainingSection | None:
    """Return the curve, the gauge and the ledger; what is not known is left out."""
    facts = _facts(cost)
    if curve.is_empty and not facts and not cost.seconds:
        return None
    return {
        "curve": None if curve.is_empty else draw_loss_curve(curve.train, curve.evaluation),
        "gauge": _draw_kl_gauge(curve.kl_to_base) if curve.kl_to_base else None,
        "facts": facts,
        "measures": [(_label(name), spent) for name, spent in cost.measures.items()],
        "break_even": cost.break_even,
    }


def draw_loss_curve(train: Points, evaluation: Points) -> Markup:
    """Draw (step, loss) of training as a line and of evaluation as points on the same axes."""
    assert train or evaluation, "a curve needs a point"

    def plot(axes: Axes) -> None:
        if train:
            axes.plot(*zip(*thin_points(train), strict=True), color=BASE, gid="train")
        if evaluation:
            axes.plot(
                *zip(*evaluation, strict=True), color=GOOD, ls="--", marker="o", mfc=PAPER, mew=1.5
            )
        finish_axes(axes, "optimizer step", "nats per trained token", whole=True)

    label = f"Loss over {len(train)} training and {len(evaluation)} evaluation points"
    return draw("loss", label, plot)


def _draw_kl_gauge(points: Points) -> Markup:
    """Draw (step, KL to the base) on replay text: the live gauge of forgetting."""
    assert points, "a curve needs a point"

    def plot(axes: Axes) -> None:
        axes.plot(*zip(*thin_points(points), strict=True), color=OPEN)
        axes.set_ylim(bottom=0)
        finish_axes(axes, "optimizer step", "KL to base, nats/token", whole=True)

    return draw("kl", f"KL to the base over {len(points)} steps", plot, height=140)


def _iter_records(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield a JSONL file's objects; a last line cut off by a crash is left out."""
    if not path.exists():
        return
    # str.splitlines would also cut at U+2028 and U+0085, which JSON strings may hold.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
        except ValueError:
            if number == len(lines):
                return
            raise LlmtuneError(
                f"{path}:{number}: not JSON; the log of the run is damaged"
            ) from None
        if isinstance(record, Mapping):
            yield record


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
    found = {name: finite(manifest.record(name).get(key)) for name in TIMED_STAGES}
    return {name: value for name, value in found.items() if value is not None}


def _weights_bytes(directory: Path) -> int | None:
    """Return the bytes of a directory's safetensors files, or None if there are none."""
    sizes = [file.stat().st_size for file in directory.glob("*.safetensors")]
    return sum(sizes) if sizes else None


def _facts(cost: Cost) -> tuple[Fact, ...]:
    """Return what is known of tokens and sizes; time and memory have their own table."""
    known = (
        ("optimizer steps", cost.steps, format_count),
        ("tokens read in training", cost.tokens, format_count),
        ("tokens trained on", cost.trained_tokens, format_count),
        ("tokens per second", cost.tokens_per_second, format_count),
        ("adapter on disk", cost.adapter_bytes, format_bytes),
        ("merged model on disk", cost.merged_bytes, format_bytes),
    )
    return tuple(Fact(name, form(value)) for name, value, form in known if value is not None)


def _label(name: str) -> str:
    if name in MEASURE_LABELS:
        return MEASURE_LABELS[name]
    is_arm = arm_kind(name) in (*MAIN_ARMS, *ALTERNATIVES, OTHER)
    return split_name(name).label.lower() if is_arm else format_label(name)
