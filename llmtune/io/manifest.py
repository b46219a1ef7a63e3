"""A run's manifest: its config, its sources, and which stages are finished on which inputs."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, cast

from llmtune.errors import LlmtuneError
from llmtune.io.environment import machine, versions
from llmtune.io.json_files import read_json_object
from llmtune.io.run_dir import RunDir, atomic_write_json

REDO = "damaged; rerun with --force to redo it"
STAGES = ("train", "merge", "evaluate")


class TrainRecord(TypedDict, total=False):
    """What training records of itself, as far as it is read by name."""

    steps: int
    tokens: int
    trained_tokens: int
    seconds: float
    peak_bytes: int
    final_loss: float
    final_eval_loss: float | None
    stopped_by: str
    best_checkpoint: str | None
    order_hash: str
    adapter_bytes: int
    choices: Mapping[str, str]
    rows: Mapping[str, Any]
    """How many there are, how many were seen, and whether the loss was still falling."""
    protect: Mapping[str, Any] | None
    estimate: "EstimateRecord | None"
    device: str
    dtype: str


class EstimateRecord(TypedDict, total=False):
    """The memory that was estimated before training: in all, and by component."""

    total_bytes: int
    components: Mapping[str, int]


class CheckRecord(TypedDict, total=False):
    """What a merge's check against the live model found, as far as it is read by name."""

    kl: float
    top1_agreement: float
    perplexity: float
    live_perplexity: float
    max_logit_difference: float
    num_tokens: int
    num_labels: int
    num_same_labels: int
    num_open_prompts: int
    num_same_texts: int
    dtype: str
    base_kl: float | None
    live_kl: float | None
    divergences: Sequence[Mapping[str, Any]]
    open_prompts: Sequence[str]


class MergeRecord(TypedDict, total=False):
    """What merging records of itself, as far as it is read by name."""

    out_dir: str
    """Relative to the run if it is in it."""
    base: str
    """What the adapter was added to: original or dequantized."""
    strength: float
    num_bytes: int
    seconds: float
    candidates: Mapping[str, CheckRecord]
    """Of both bases, if there was a choice."""
    check: CheckRecord | None


class EvaluateRecord(TypedDict):
    """What evaluating records of itself."""

    extent: str
    suites: Mapping[str, Mapping[str, float]]
    """suite -> arm -> mean."""
    left_out: Mapping[str, str]
    """What could not be measured, and why."""
    measures: "Sequence[MeasureJson]"
    """What each cost, as it was estimated beforehand and as it was."""


class MeasureJson(TypedDict):
    """One measure: forward tokens (at most, where text is written), and seconds."""

    measure: str
    tokens: int
    estimated_seconds: float
    seconds: float | None
    """None until it was measured."""


class ExportRecord(TypedDict, total=False):
    """What an export records of itself, as far as it is read by name."""

    to: str
    out: str
    """The file, directory or address; relative to the run if it is in it."""
    num_bytes: int
    notices: Sequence[str]


class BaseRecord(TypedDict, total=False):
    """What is recorded of the base: where it came from, and how it was loaded."""

    path: str
    origin: str
    revision: str | None
    gguf_sha256: str | None
    stored: str
    """How the base was stored, and what its weights became, if it was quantized."""
    stored_fingerprint: str
    fingerprint: str
    dtype: str
    quantization: str
    template_date: str


class StageRecord(TypedDict, total=False):
    """What is recorded of one stage; from `finished` on it is absent until the stage is done."""

    inputs: Mapping[str, Any]
    fingerprint: str
    started: str
    finished: str
    seconds: float
    peak_bytes: int
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds; every change is a new value, written whole by `save`."""

    config: Mapping[str, Any]
    created: str = field(default_factory=lambda: _now())
    machine: Mapping[str, Any] = field(default_factory=machine)
    versions: Mapping[str, Any] = field(default_factory=versions)
    base: BaseRecord = field(default_factory=lambda: BaseRecord())
    data: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, StageRecord] = field(default_factory=dict)

    @property
    def trained(self) -> TrainRecord:
        """What training recorded; empty before it is finished."""
        return cast(TrainRecord, self.record("train").get("result") or {})

    @property
    def merged(self) -> MergeRecord:
        """What merging recorded; empty before it is finished."""
        return cast(MergeRecord, self.record("merge").get("result") or {})

    @property
    def evaluated(self) -> EvaluateRecord | None:
        """What evaluating recorded; None before it is finished."""
        return cast(EvaluateRecord, self.record("evaluate").get("result") or None)

    def record(self, stage: str) -> StageRecord:
        """Return what is recorded of a stage; empty if it was never begun."""
        return self.stages.get(stage, {})

    def start(self, stage: str, fingerprint: str, inputs: Mapping[str, Any]) -> "Manifest":
        """Return the manifest with `stage` begun, and with it every later stage undone."""
        kept = {name: record for name, record in self.stages.items() if not _is_after(name, stage)}
        kept[stage] = {"fingerprint": fingerprint, "inputs": inputs, "started": _now()}
        return replace(self, stages=kept)

    def finish(
        self, stage: str, *, seconds: float, peak_bytes: int, result: Mapping[str, Any]
    ) -> "Manifest":
        """Return the manifest with `stage` done."""
        done = self.stages[stage] | StageRecord(
            seconds=seconds, peak_bytes=peak_bytes, result=result, finished=_now()
        )
        return replace(self, stages={**self.stages, stage: done})

    def save(self, run: RunDir) -> None:
        """Write `manifest.json` whole or not at all."""
        atomic_write_json(run.manifest_path, {"format": 1, **self.__dict__})


def is_judgment(config: Mapping[str, Any]) -> bool:
    """Whether a manifest's config is of `llmtune judge`: of no run."""
    return "judged" in config


def read_manifest(run: RunDir) -> Manifest:
    """Read a run's manifest.

    Raises:
        LlmtuneError: there is none, or it is not one of ours.
    """
    path = run.manifest_path
    if not path.is_file():
        raise LlmtuneError(
            f"{run.path}: not a run (no manifest.json); start one with: llmtune run CONFIG"
        )
    value = read_json_object(path, advice=REDO)
    if value.pop("format", None) != 1:
        raise LlmtuneError(f"{path}: not a manifest that this version reads (expected format 1)")
    known = {key: value[key] for key in Manifest.__dataclass_fields__ if key in value}
    if not _is_well_formed(known):
        raise LlmtuneError(f"{path}: is not what llmtune writes; {REDO}")
    return Manifest(**known)


def _is_well_formed(values: Mapping[str, Any]) -> bool:
    """Whether sections are objects, with a config's model, and every stage's result is, too."""
    sections = [value for key, value in values.items() if key != "created"]
    if not all(isinstance(value, dict) for value in sections):
        return False
    stages = values.get("stages", {}).values()
    if not all(isinstance(stage, dict) for stage in stages):
        return False
    parts = [stage[key] for stage in stages for key in ("inputs", "result") if key in stage]
    return (
        all(isinstance(part, dict) for part in parts)
        and isinstance(values.get("created", ""), str)
        and isinstance(values.get("config"), dict)
        and isinstance(values["config"].get("model", {}), dict)
    )


def _is_after(stage: str, other: str) -> bool:
    """Whether `stage` builds on `other`; what is not among `STAGES` (an export) has none after."""
    is_ordered = stage in STAGES and other in STAGES
    return is_ordered and STAGES.index(stage) > STAGES.index(other)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
