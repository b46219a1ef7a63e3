"""Several trainings of one recipe that differ in their seed: one verdict with their noise in it."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmtune.config import RunConfig
from llmtune.errors import LlmtuneError
from llmtune.evaluation.compare import arm_kind
from llmtune.evaluation.main_arms import WITHOUT_ADAPTER, compared_arms
from llmtune.evaluation.results import ArmResult, arm_result_path, read_arm_result, save_arm_result
from llmtune.experiments.fan_out import Task, do_all
from llmtune.experiments.versus import tell_apart
from llmtune.exporting.config import ExportConfig
from llmtune.io.json_files import read_json_object
from llmtune.io.manifest import Manifest, read_manifest
from llmtune.io.run_dir import SEEDS_FILE, RunDir, atomic_write_json, atomic_write_text
from llmtune.launching.base import Engine
from llmtune.reporting.build import build_report, gather_evidence, write_report
from llmtune.reporting.html import make_environment
from llmtune.reporting.joint import JointChange, JointSuite, measure_joint_suites
from llmtune.reporting.report import Report
from llmtune.reporting.run_results import Results, read_current_results
from llmtune.reporting.sections.seeds import SeedStudy, SeedSuite, adjust, show_seeds
from llmtune.reporting.sections.training import Cost
from llmtune.reporting.suites import SuiteReport
from llmtune.reporting.verdict.caveats import find_caveats, find_training_caveats
from llmtune.reporting.verdict.outcome import SHIPPING, Verdict
from llmtune.reporting.verdict.rules import decide
from llmtune.runs.ledger import differences, refuse_foreign_place
from llmtune.runs.stage import deciding_knobs_of

log = logging.getLogger("llmtune")

MIN_RUNS = 3
COUNTS = ("rows_read", "rows_kept", "examples")
PAGE_NAME = "seeds.html"


@dataclass(frozen=True)
class SeedRun:
    """One of the trainings; `knobs` are those that decide the adapter, as nested JSON values."""

    run: RunDir
    knobs: Mapping[str, Any]


def parse_seeds(text: str, first: int) -> tuple[int, ...]:
    """Return the seeds that `--seeds` names: how many from `first` on, or a list with commas.

    Raises:
        LlmtuneError: it is neither, a seed is there twice, or there are fewer than three.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise LlmtuneError(f"--seeds {text}: expected a number of seeds, or a list such as 1,2,3")
    numbers = tuple(map(int, parts))
    seeds = numbers if "," in text else tuple(range(first, first + numbers[0]))
    if len(set(seeds)) != len(seeds):
        raise LlmtuneError(f"--seeds {text}: a seed is there twice")
    if len(seeds) < MIN_RUNS:
        raise LlmtuneError(
            f"--seeds {text}: {len(seeds)} seeds; the noise of training needs {MIN_RUNS} or more"
        )
    return seeds


def run_seeds(
    config: RunConfig, seeds: Sequence[int], *, force: bool = False, engine: Engine | None = None
) -> Report:
    """Train and judge the config with every seed, in `run_dir/seed-N`, and all of them together.

    On an engine they train side by side, and then are judged side by side.

    What is finished is skipped. What does not depend on the training (original and base, few-shot,
    your prompts) is measured with the first seed and taken over by the others. Nothing is exported:
    export the run that you choose.

    Raises:
        LlmtuneError: the input is wrong, or `run_dir` holds something else.
        RunInterrupted: stopped; the same call continues.
    """
    place = config.run_dir
    if config.run.manifest_path.is_file():
        raise LlmtuneError(f"{place}: holds a single run; choose another run_dir for several seeds")
    refuse_foreign_place(place, {f"seed-{seed}" for seed in seeds})
    first, *others = (
        config.model_copy(
            update={"run_dir": place / f"seed-{seed}", "seed": seed, "export": ExportConfig()}
        )
        for seed in seeds
    )
    log.info("seeds: %d%s", len(seeds), f" on {engine.name}" if engine else "")
    trained = [Task(first, force), *(Task(one, force, until="train") for one in others)]
    _require_all(trained, engine)
    for one in others:
        share_base_results(first.run, one.run)
    _require_all([Task(one) for one in others], engine)
    names = [one.run_dir.name for one in (first, *others)]
    atomic_write_json(place / SEEDS_FILE, {"format": 1, "runs": names})
    return report_seeds(place)


def _require_all(tasks: Sequence[Task], engine: Engine | None) -> None:
    for number, error in do_all(tasks, engine):
        task = tasks[number]
        if error is not None:
            log.error("seeds: seed %d failed", task.config.seed)
            raise error
        ended = "trained" if task.until == "train" else "trained and judged"
        log.info("seeds: seed %d is %s", task.config.seed, ended)


def share_base_results(first: RunDir, other: RunDir) -> None:
    """Give a further training of one recipe the scores of the base, which are the same for all.

    The evaluation takes them only if the recipe and the model are equal, as it does with its own.
    """
    for path in sorted(first.evaluations_dir.glob("endpoint-*.jsonl")):
        if not (copy := other.evaluations_dir / path.name).exists():
            atomic_write_text(copy, path.read_text(encoding="utf-8"))
    for path in sorted(first.evaluations_dir.glob("*.json")):
        result = read_arm_result(path)
        known = arm_result_path(other.evaluations_dir, result.suite, result.arm)
        if arm_kind(result.arm) in WITHOUT_ADAPTER and not known.exists():
            save_arm_result(replace(result, seconds=0.0), other.evaluations_dir)


def report_seeds(place: Path) -> Report:
    """Build the joint report of the runs that `run_seeds` left in a directory, and write it.

    Raises:
        LlmtuneError: a run is missing or unfinished, or they are not of one recipe.
    """
    names = read_json_object(place / SEEDS_FILE)["runs"]
    runs = [open_seed_run(place / name) for name in names]
    built = join_reports(runs, place.resolve().name)
    write_report(built, RunDir(place))
    return built


def join_reports(runs: Sequence[SeedRun], name: str) -> Report:
    """Return the joint report of several trainings: their means, with both noises in the intervals.

    What belongs to one training alone (curve, diagnoses, examples) is that of the first.

    Raises:
        LlmtuneError: as `compare_seeds`.
    """
    manifests = _check(runs)
    reports = [build_report(each.run) for each in runs]
    first, resampling = reports[0], reports[0].resampling
    results = _shared(runs, manifests)
    joint = measure_joint_suites(results, resampling)
    suites = tuple(each.report for each in joint)
    evidence = gather_evidence(first, suites)
    evidence = replace(evidence, diagnostics=evidence.diagnostics.without_more_rows())
    verdict = _carry_bad_seeds(decide(evidence), runs, reports)
    study = _study(runs, reports, results, joint)
    return replace(
        first,
        name=name,
        verdict=verdict,
        caveats=find_training_caveats(manifests[0].trained) + find_caveats(evidence),
        suites=suites,
        strengths=None,
        shifts=(),
        cost=_add_costs([report.cost for report in reports]),
        seeds=replace(study, verdict=verdict.name),
    )


def _carry_bad_seeds(
    verdict: Verdict, runs: Sequence[SeedRun], reports: Sequence[Report]
) -> Verdict:
    """Name in a verdict to ship the trainings that by themselves would not: one may be chosen."""
    if verdict.kind not in SHIPPING:
        return verdict
    bad = tuple(
        f"seed {each.knobs['seed']} alone is {report.verdict.name}"
        for each, report in zip(runs, reports, strict=True)
        if report.verdict.tone == "bad"
    )
    return replace(verdict, carries=(*verdict.carries, *bad))


def open_seed_run(run_dir: Path) -> SeedRun:
    """Return a run with the knobs that decided its adapter, as its manifest records them."""
    run = RunDir(run_dir)
    return SeedRun(run, deciding_knobs_of(read_manifest(run).config))


def compare_seeds(runs: Sequence[SeedRun]) -> SeedStudy:
    """Compare several trainings of one recipe, on every suite all have, and judge them together.

    Raises:
        LlmtuneError: fewer than three runs, two of the same seed, anything but the seed differs in
            what decided their adapters, or they share no suite; each is named.
    """
    joined = join_reports(runs, "").seeds
    assert joined is not None, "a joint report has its study"
    return joined


def _check(runs: Sequence[SeedRun]) -> list[Manifest]:
    tell_apart([each.run.path for each in runs])
    if len(runs) < MIN_RUNS:
        raise LlmtuneError(
            f"{len(runs)} runs: the noise of training needs {MIN_RUNS} seeds or more"
        )
    manifests = [read_manifest(each.run) for each in runs]
    _require_one_recipe(runs, manifests)
    return manifests


def _shared(runs: Sequence[SeedRun], manifests: Sequence[Manifest]) -> list[Results]:
    """Return the results of every run, on the suites that all of them compared."""
    found = [_results(each.run, manifest) for each, manifest in zip(runs, manifests, strict=True)]
    shared = [name for name in found[0] if all(name in results for results in found)]
    if not shared:
        names = tell_apart([each.run.path for each in runs])
        raise LlmtuneError(
            f"{', '.join(names)} have no suite on which the same two models were compared in all "
            "of them; evaluate each with: llmtune eval RUN"
        )
    return [{name: results[name] for name in shared} for results in found]


def _study(
    runs: Sequence[SeedRun],
    reports: Sequence[Report],
    results: Sequence[Results],
    joint: Sequence[JointSuite],
) -> SeedStudy:
    suites = [
        _seed_suite([found[each.report.name] for found in results], each.report, each.found)
        for each in joint
        if each.found is not None
    ]
    order = {suite.name: place for place, suite in enumerate(reports[0].suites)}
    return SeedStudy(
        names=tell_apart([each.run.path for each in runs]),
        seeds=tuple(int(each.knobs["seed"]) for each in runs),
        verdicts=tuple(report.verdict.name for report in reports),
        suites=tuple(sorted(adjust(suites), key=lambda suite: order[suite.name])),
        resampling=reports[0].resampling,
    )


def _seed_suite(
    trainings: Sequence[Mapping[str, ArmResult]], report: SuiteReport, found: JointChange
) -> SeedSuite:
    pair = report.compared
    assert pair is not None, "a joint change is of a compared pair"
    change, items = found.change, found.interval.items
    return SeedSuite(
        name=report.name,
        role=report.role,
        metric=report.metric,
        higher_is_better=report.higher_is_better,
        n=found.n,
        compared=pair,
        before=float(np.mean([arms[pair[0]].mean for arms in trainings])),
        after=tuple(arms[pair[1]].mean for arms in trainings),
        changes=found.by_training,
        difference=change.difference,
        low=change.low,
        high=change.high,
        p_value=change.p_value,
        items_alone=(items.low, items.high),
        spread=float(np.std(found.by_training, ddof=1)),
        is_enough=found.is_enough,
    )


def _add_costs(costs: Sequence[Cost]) -> Cost:
    """Return what all trainings took together; peaks and sizes are the largest.

    Steps and tokens stay those of one training.
    """
    seconds: dict[str, float] = {}
    measures: dict[str, float] = {}
    for cost in costs:
        for total, part in ((seconds, cost.seconds), (measures, cost.measures)):
            for name, spent in part.items():
                total[name] = total.get(name, 0.0) + spent
    stages = dict.fromkeys(stage for cost in costs for stage in cost.peak_bytes)
    return replace(
        costs[0],
        seconds=seconds,
        measures=measures,
        peak_bytes={
            stage: max(cost.peak_bytes[stage] for cost in costs if stage in cost.peak_bytes)
            for stage in stages
        },
        training_gpu_peak_bytes=_largest(cost.training_gpu_peak_bytes for cost in costs),
        adapter_bytes=_largest(cost.adapter_bytes for cost in costs),
        merged_bytes=_largest(cost.merged_bytes for cost in costs),
        break_even=None,
    )


def _largest(sizes: Iterable[int | None]) -> int | None:
    return max((size for size in sizes if size is not None), default=None)


def _require_one_recipe(runs: Sequence[SeedRun], manifests: Sequence[Manifest]) -> None:
    first = runs[0]
    seen: dict[int, SeedRun] = {}
    for each, manifest in zip(runs, manifests, strict=True):
        seed = each.knobs["seed"]
        if seed in seen:
            raise LlmtuneError(
                f"{seen[seed].run.path} and {each.run.path}: both were trained with seed {seed}; "
                "train again with: llmtune train CONFIG seed=N run_dir=runs/seed-N"
            )
        seen[seed] = each
        differing = [
            f"{key}: {old!r} / {new!r}"
            for key, old, new in differences("", first.knobs, each.knobs)
            if key != "seed"
        ]
        differing += [
            f"different {name}"
            for name, of in (("bases", _base), ("starting adapters", _start), ("rows", _rows))
            if of(manifests[0]) != of(manifest)
        ]
        if differing:
            raise LlmtuneError(
                f"{first.run.path} and {each.run.path}: not the same recipe with a different seed "
                f"({'; '.join(differing)}); two runs are compared with: llmtune report A B"
            )


def _base(manifest: Manifest) -> object:
    return manifest.base.get("fingerprint")


def _start(manifest: Manifest) -> object:
    return (manifest.record("train").get("inputs") or {}).get("start")


def _rows(manifest: Manifest) -> object:
    """Return the rows of each source as they were counted; their order is the seed's."""
    return {
        split: [[source.get(key) for key in COUNTS] for source in found.get("sources", [])]
        for split, found in manifest.data.items()
    }


def _results(run: RunDir, manifest: Manifest) -> Results:
    results = read_current_results(run, manifest)
    return {name: arms for name, arms in results.items() if compared_arms(arms) is not None}


def write_seeds(study: SeedStudy, out_dir: Path) -> Path:
    """Write `seeds.html` and `seeds.json` into a directory and return the page's path."""
    page = out_dir / PAGE_NAME
    atomic_write_json(page.with_suffix(".json"), study.as_json())
    environment = make_environment()
    shown = show_seeds(study)
    assert shown is not None
    atomic_write_text(page, environment.get_template("seeds_page.html.j2").render(**shown))
    return page
