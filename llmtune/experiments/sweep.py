"""Runs that differ in knobs: a grid of them, and which is best without flattering the winner.

The best of many scores is better by luck than it is. So one half of the target suite's items
chooses the winner, and the other half says how good it is and how far the others are from it.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmtune.config import RunConfig
from llmtune.errors import LlmtuneError
from llmtune.evaluation.compare import compare_arms
from llmtune.evaluation.halves import in_selection_half
from llmtune.evaluation.main_arms import AFTER
from llmtune.evaluation.results import ArmResult
from llmtune.experiments.fan_out import Task, do_all
from llmtune.experiments.versus import MAY_DIFFER, tell_apart
from llmtune.io.fingerprint import JsonObject
from llmtune.io.json_files import read_json_object
from llmtune.io.manifest import read_manifest
from llmtune.io.run_dir import SWEEP_FILE, RunDir, atomic_write_json
from llmtune.launching.base import Engine
from llmtune.reporting.numbers import Unit, unit_of_metric, without_nan
from llmtune.reporting.run_results import read_current_results, read_resampling, restrict
from llmtune.runs.ledger import differences, refuse_foreign_place
from llmtune.runs.listing import summarize_run
from llmtune.runs.stage import deciding_knobs_of
from llmtune.runs.targets import require_run

log = logging.getLogger("llmtune")

MOST_POINTS = 200


@dataclass(frozen=True)
class Point:
    """One run of a grid: its settings as they were written, and its config."""

    name: str
    settings: Mapping[str, str]
    config: RunConfig


@dataclass(frozen=True)
class RankedRun:
    """A run among others. Scores are means over items, in the metric's unit."""

    name: str
    path: str
    settings: Mapping[str, Any]
    verdict: str | None
    eval_loss: float | None
    seconds: float | None
    chosen_by: float
    """On the half of the items that chooses."""
    score: float
    """On the other half."""
    difference: float
    """To the winner, on the other half; (low, high) is its interval."""
    low: float
    high: float
    standing: str
    """winner, tied, worse or better (than the winner that the first half chose)."""


@dataclass(frozen=True)
class RankStudy:
    """Several runs on the items of one suite, the winner first."""

    suite: str
    metric: str
    arm: str
    knobs: tuple[str, ...]
    """What the runs differ in."""
    runs: tuple[RankedRun, ...]
    num_choosing: int
    num_judging: int
    confidence: float
    """Of each interval: all of them hold together with 95 %."""
    failed: Mapping[str, str]
    """Points that ended with an error, and which."""

    @property
    def unit(self) -> Unit:
        """How scores are written."""
        return unit_of_metric(self.metric)

    @property
    def ties(self) -> tuple[str, ...]:
        """The runs that cannot be told from the winner."""
        return tuple(run.name for run in self.runs[1:] if run.standing == "tied")

    def as_json(self) -> JsonObject:
        """Return the ranking for scripts."""
        values: dict[str, Any] = without_nan({"format": 1, **asdict(self)})
        return values


def plan_sweep(target: str, arguments: Sequence[str]) -> list[Point]:
    """Return the points of a grid; every one is checked before the first runs.

    Args:
        target: a config or a run.
        arguments: `key=value` sets a key in all points, `key=a,b` makes one point for each value;
            commas inside brackets belong to a value.

    Raises:
        LlmtuneError: no key has several values, there are too many points, or a point is wrong.
    """
    grid: dict[str, list[str]] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key:
            raise LlmtuneError(f"{argument}: expected key=a,b, as in train.learning_rate=1e-4,3e-4")
        if key in grid:
            raise LlmtuneError(f"{argument}: {key} is there twice; give its values as one list")
        grid[key] = _split_values(text)
    if not any(len(values) > 1 for values in grid.values()):
        raise LlmtuneError(
            "a sweep needs a key with several values, as in train.learning_rate=1e-4,3e-4"
        )
    chosen = list(itertools.product(*grid.values()))
    if len(chosen) > MOST_POINTS:
        raise LlmtuneError(f"the grid has {len(chosen)} points; expected {MOST_POINTS} at most")
    place = require_run(target, [f"{k}={v[0]}" for k, v in grid.items() if len(v) == 1]).run_dir
    varied = [key for key, values in grid.items() if len(values) > 1]
    points, problems = [], []
    for values in chosen:
        settings = dict(zip(grid, values, strict=True))
        name = _name_point({key: settings[key] for key in varied})
        overrides = [f"{key}={value}" for key, value in settings.items()]
        try:
            config = require_run(target, [*overrides, f"run_dir={place / name}"])
        except LlmtuneError as error:
            problems.append(f"{name}: {error}")
        else:
            points.append(Point(name, {key: settings[key] for key in varied}, config))
    if problems:
        raise LlmtuneError("\n".join(problems))
    if len({point.name for point in points}) < len(points):
        raise LlmtuneError("a value is there twice; give each value of a key once")
    refuse_foreign_place(place, {point.name for point in points})
    return points


def run_sweep(
    points: Sequence[Point], *, force: bool = False, engine: Engine | None = None
) -> RankStudy:
    """Run every point and rank them; what is finished is skipped.

    On an engine they run side by side; the ranking is the same.

    A point that fails is named and the rest continue. Prepared rows and the scores of the base are
    shared by the points that have the same.

    Raises:
        LlmtuneError: all points failed.
        RunInterrupted: stopped; the same call continues.
    """
    place = points[0].config.run_dir.parent
    failed: dict[str, str] = {}
    tasks = [Task(point.config, force) for point in points]
    log.info("sweep: %d runs%s", len(points), f" on {engine.name}" if engine else "")
    for count, (number, error) in enumerate(do_all(tasks, engine), start=1):
        name = points[number].name
        if error is None:
            log.info("sweep: %d of %d done, %s", count, len(points), name)
        else:
            log.warning("sweep: %s failed: %s", name, error)
            failed[name] = str(error)
        _write(place, points, failed)
    if len(failed) == len(points):
        raise LlmtuneError(
            "every point of the sweep failed; the first: " + next(iter(failed.values()))
        )
    return report_sweep(place)


def report_sweep(place: Path) -> RankStudy:
    """Rank the points that a sweep left in a directory."""
    recorded = read_json_object(place / SWEEP_FILE)
    done = [place / each["name"] for each in recorded["points"] if each["error"] is None]
    failed = {each["name"]: each["error"] for each in recorded["points"] if each["error"]}
    study = replace(rank_runs(done), failed=failed)
    atomic_write_json(place / "ranking.json", study.as_json())
    return study


def rank_runs(paths: Sequence[Path]) -> RankStudy:
    """Rank finished runs on the first target suite that all of them were scored on.

    Raises:
        LlmtuneError: they share no target suite, or its items or scoring differ.
    """
    runs = [RunDir(path) for path in paths]
    summaries = [summarize_run(run) for run in runs]
    deciding = [deciding_knobs_of_run(run) for run in runs]
    knobs = differing_knobs(deciding)
    results = [_target_results(run) for run in runs]
    arm, suite = _shared(results, paths)
    scored = [found[suite][arm] for found in results]
    choosing = {item.id for item in scored[0].items if in_selection_half(item.cluster or item.id)}
    judging = {item.id for item in scored[0].items} - choosing
    if not choosing or not judging:
        raise LlmtuneError(f"suite {suite}: {scored[0].n} items are too few to rank runs by")
    chosen = [restrict(each, choosing) for each in scored]
    judged = [restrict(each, judging) for each in scored]
    sign = 1 if scored[0].higher_is_better else -1
    order = sorted(range(len(runs)), key=lambda place: -sign * chosen[place].mean)
    resampling = read_resampling(read_manifest(runs[0]).config)
    confidence = 1 - (1 - resampling.confidence) / max(1, len(runs) - 1)
    across = MAY_DIFFER if any(knob.startswith("model.") for knob in knobs) else ()
    names = tell_apart(paths)
    ranked = []
    for place in order:
        best, mine = judged[order[0]], judged[place]
        found = compare_arms(
            best, mine, resampling=replace(resampling, confidence=confidence), across=across
        )
        is_clear = found.is_enough and not found.low <= 0 <= found.high
        standing = ("better" if found.gain > 0 else "worse") if is_clear else "tied"
        summary = summaries[place]
        ranked.append(
            RankedRun(
                name=names[place],
                path=str(paths[place]),
                settings={knob: _at(deciding[place], knob) for knob in knobs},
                verdict=summary.verdict,
                eval_loss=summary.eval_loss,
                seconds=summary.seconds,
                chosen_by=chosen[place].mean,
                score=mine.mean,
                difference=found.difference,
                low=found.low,
                high=found.high,
                standing="winner" if place == order[0] else standing,
            )
        )
    return RankStudy(
        suite,
        scored[0].metric,
        arm,
        knobs,
        tuple(ranked),
        len(choosing),
        len(judging),
        confidence,
        {},
    )


def differing_knobs(deciding: Sequence[JsonObject]) -> tuple[str, ...]:
    """Return the keys in which the deciding knobs of runs differ; `seed` is one of them."""
    first, *others = deciding
    keys = {
        key
        for other in others
        for one, two in ((first, other), (other, first))
        for key, *_ in differences("", one, two)
    }
    return tuple(sorted(key for key in keys if not any(k.startswith(f"{key}.") for k in keys)))


def deciding_knobs_of_run(run: RunDir) -> JsonObject:
    """Return the knobs that decided a run's adapter."""
    return deciding_knobs_of(read_manifest(run).config)


def render_ranking(study: RankStudy) -> RenderableType:
    """Return the ranking as a table with what it means."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    headings = (*(knob.rpartition(".")[2] for knob in study.knobs), "chosen by", "score")
    for heading in (*headings, "minus winner", "", "eval loss"):
        table.add_column(heading, justify="right")
    for run in study.runs:
        is_first = run.standing == "winner"
        change = "" if is_first else study.unit.change(run.difference)
        between = "" if is_first else f" {study.unit.interval(run.low, run.high)}"
        table.add_row(
            Text(run.name, "bold" if is_first else ""),
            *(Text(_short(run.settings[knob])) for knob in study.knobs),
            study.unit.score(run.chosen_by),
            study.unit.score(run.score),
            Text(f"{change}{between}"),
            Text(run.standing, {"winner": "green", "worse": "red"}.get(run.standing, "")),
            "" if run.eval_loss is None else f"{run.eval_loss:.3f}",
        )
    lines = [
        f"Suite {study.suite}, {study.arm} models. {study.num_choosing} items chose the winner, "
        f"the other {study.num_judging} give the scores, so luck in choosing flatters none. "
        f"Intervals hold for all {len(study.runs)} runs together.",
    ]
    winner = study.runs[0]
    if winner.verdict:
        lines.append(f"The winner's own verdict: {winner.verdict} (llmtune report {winner.path}).")
    if study.ties:
        lines.append(f"Not to be told from the winner: {', '.join(study.ties)}.")
    lines += [f"failed: {name}: {error}" for name, error in study.failed.items()]
    return Group(table, *map(Text, lines))


def _split_values(text: str) -> list[str]:
    values, depth, start = [], 0, 0
    for place, character in enumerate(text):
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append(text[start:place])
            start = place + 1
    values.append(text[start:])
    if not all(value.strip() for value in values):
        raise LlmtuneError(f"{text}: a value is empty; expected values with commas between them")
    return [value.strip() for value in values]


def _name_point(settings: Mapping[str, str]) -> str:
    """Return a directory's name that says the settings."""
    last = [key.rpartition(".")[2] for key in settings]
    keys = last if len(set(last)) == len(last) else list(settings)
    pairs = (f"{key}-{value}" for key, value in zip(keys, settings.values(), strict=True))
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in "_".join(pairs))[:120]


def _write(place: Path, points: Sequence[Point], failed: Mapping[str, str]) -> None:
    listed = [
        {"name": point.name, "settings": dict(point.settings), "error": failed.get(point.name)}
        for point in points
        if point.name in failed or point.config.run.report_json_path.is_file()
    ]
    atomic_write_json(place / SWEEP_FILE, {"format": 1, "points": listed})


def _target_results(run: RunDir) -> dict[str, dict[str, ArmResult]]:
    results = read_current_results(run, read_manifest(run))
    return {
        name: arms
        for name, arms in results.items()
        if any(arm in arms and arms[arm].role == "target" for arm in AFTER)
    }


def _shared(
    results: Sequence[Mapping[str, Mapping[str, ArmResult]]], paths: Sequence[Path]
) -> tuple[str, str]:
    for arm in AFTER:  # what ships counts, if every run has it
        for suite in results[0]:
            if all(suite in found and arm in found[suite] for found in results):
                return arm, suite
    listed = ", ".join(map(str, paths))
    raise LlmtuneError(
        f"{listed}: no target suite on which all of them were scored; score each with: llmtune "
        "eval RUN"
    )


def _at(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for name in key.split("."):
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."
