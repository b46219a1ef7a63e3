"""The runs in a folder, each with how far it came and what its report said."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.io.json_files import read_json_object
from llmtune.io.manifest import STAGES, Manifest, read_manifest
from llmtune.io.run_dir import RunDir
from llmtune.io.safetensors import ADAPTER_FILE
from llmtune.io.yaml_source import SourcedTree, apply_overrides
from llmtune.reporting.numbers import finite, unit_of_metric

PAST = {"train": "trained", "merge": "merged", "evaluate": "evaluated"}
LOWEST_FIRST = frozenset({"loss", "eval_loss", "learning_rate", "seconds", "bytes"})


@dataclass(frozen=True)
class TargetScore:
    """What the report says of the first target suite: before and after, of the compared arms."""

    suite: str
    metric: str
    before: float | None
    after: float | None
    higher_is_better: bool

    @property
    def gain(self) -> float | None:
        """How much better it became; None if one of the two was not measured."""
        if self.before is None or self.after is None:
            return None
        return (self.after - self.before) * (1 if self.higher_is_better else -1)

    @property
    def words(self) -> str:
        """The change, as `movies 70.7 % → 88.3 %`."""
        unit = unit_of_metric(self.metric)
        return f"{self.suite} {unit.score(self.before)} → {unit.score(self.after)}"


@dataclass(frozen=True)
class RunSummary:
    """One line of `llmtune runs`."""

    path: str
    state: str
    verdict: str | None
    base: str
    created: str
    target: TargetScore | None = None
    adapter: str = ""
    """The method and its size, such as `lora 16`."""
    learning_rate: float | None = None
    loss: float | None = None
    """Training loss of the last steps, nats per trained token."""
    eval_loss: float | None = None
    seconds: float | None = None
    """Of all finished stages together."""
    bytes: int | None = None
    """Of the adapter."""

    @property
    def minute(self) -> str:
        """When it was made, in UTC and without the seconds."""
        return self.created[:16].replace("T", " ")

    def sort_value(self, key: str) -> Any:
        """Return what `list_runs` sorts by for a key; larger comes first."""
        if key == "score":
            target = self.target
            if target is None or target.after is None:
                return None
            return target.after if target.higher_is_better else -target.after
        if key == "gain":
            return None if self.target is None else self.target.gain
        value: float | str | None = getattr(self, key)
        return -value if key in LOWEST_FIRST and isinstance(value, int | float) else value


def list_runs(
    directory: Path, *, sort: str = "created", where: Sequence[str] = ()
) -> list[RunSummary]:
    """Return the runs directly under `directory`.

    Args:
        directory: the folder that holds run directories.
        sort: created, score, gain or a number of the summary; the best or newest comes first, and
            runs that lack it come last.
        where: `key=value` conditions on config keys, such as adapter.rank=8, or on the verdict.

    Raises:
        LlmtuneError: there is no such directory, or a condition cannot be read.
    """
    if directory.is_file():
        raise LlmtuneError(f"{directory}: is a file; expected a directory of runs")
    if not directory.is_dir():
        raise LlmtuneError(f"{directory}: no such directory; runs are made by: llmtune run CONFIG")
    conditions = [_parse_condition(text) for text in where]
    found = []
    for path in sorted(directory.glob("*/manifest.json")):
        run = RunDir(path.parent)
        try:
            manifest = read_manifest(run)
        except LlmtuneError:
            if not conditions:
                found.append(RunSummary(str(run.path), "damaged manifest", None, "", ""))
            continue
        summary = _summarize(run, manifest)
        if all(_holds(condition, manifest, summary) for condition in conditions):
            found.append(summary)
    values = {summary.path: summary.sort_value(sort) for summary in found}
    known = [summary for summary in found if values[summary.path] is not None]
    unknown = [summary for summary in found if values[summary.path] is None]
    return sorted(known, key=lambda summary: values[summary.path], reverse=True) + unknown


def summarize_run(run: RunDir) -> RunSummary:
    """Return what is known of one run.

    Raises:
        LlmtuneError: it is not a run, or its manifest is damaged.
    """
    return _summarize(run, read_manifest(run))


def _parse_condition(text: str) -> tuple[tuple[str, ...], Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise LlmtuneError(
            f"--where {text!r}: expected key=value, such as adapter.rank=8 or verdict=SHIP"
        )
    if key == "verdict":
        return (key,), value
    tree = apply_overrides(SourcedTree({}), [text])
    path = tuple(key.split("."))
    return path, tree.at(path)


def _holds(condition: tuple[tuple[str, ...], Any], manifest: Manifest, run: RunSummary) -> bool:
    path, value = condition
    if path == ("verdict",):
        return run.verdict == str(value)
    found: Any = SourcedTree(dict(manifest.config)).at(path)
    return bool(found == value)


def _summarize(run: RunDir, manifest: Manifest) -> RunSummary:
    config = SourcedTree(dict(manifest.config))
    report = _read_report(run)
    verdict = report.get("verdict")
    trained = manifest.trained
    seconds = [record.get("seconds") for record in manifest.stages.values()]
    method = config.at(("adapter", "method"))
    size = config.at(("adapter", "rank"))
    return RunSummary(
        path=str(run.path),
        state=_state(manifest),
        verdict=verdict if isinstance(verdict, str) else None,
        base=str(manifest.base.get("origin") or config.at(("model", "base")) or ""),
        created=manifest.created,
        target=_find_target(report),
        adapter=" ".join(str(part) for part in (method, size) if part is not None),
        learning_rate=finite(config.at(("train", "learning_rate"))),
        loss=finite(trained.get("final_loss")),
        eval_loss=finite(trained.get("final_eval_loss")),
        seconds=sum(filter(None, map(finite, seconds))) or None,
        bytes=_adapter_bytes(run),
    )


def _find_target(report: Mapping[str, Any]) -> TargetScore | None:
    suites = report.get("suites")
    for name, suite in suites.items() if isinstance(suites, dict) else ():
        if isinstance(suite, dict) and suite.get("role") == "target" and suite.get("compared"):
            before, after = suite["compared"]
            return TargetScore(
                suite=name,
                metric=str(suite.get("metric")),
                before=finite(suite.get(before)),
                after=finite(suite.get(after)),
                higher_is_better=bool(suite.get("higher_is_better", True)),
            )
    return None


def _adapter_bytes(run: RunDir) -> int | None:
    weights = run.adapter_dir / ADAPTER_FILE
    return weights.stat().st_size if weights.is_file() else None


def _state(manifest: Manifest) -> str:
    finished = [name for name in STAGES if manifest.record(name).get("finished")]
    begun = [name for name, record in manifest.stages.items() if not record.get("finished")]
    if begun:
        return f"{begun[0]} unfinished"
    return PAST[finished[-1]] if finished else "not started"


def _read_report(run: RunDir) -> Mapping[str, Any]:
    try:
        return read_json_object(run.report_json_path)
    except LlmtuneError:
        return {}
