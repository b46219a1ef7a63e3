"""Several trainings of one recipe that differ in their seed: how much training itself varies.

With a page, a JSON file, and a table for the terminal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmtune.errors import LlmtuneError
from llmtune.evaluation.compare import cluster_names, pair_items, require_same_recipe
from llmtune.evaluation.results import ArmResult
from llmtune.evaluation.stats import Resampling, holm, paired_bootstrap, two_level_bootstrap
from llmtune.experiments.versus import tell_apart
from llmtune.io.manifest import Manifest, read_manifest
from llmtune.io.run_dir import RunDir, atomic_write_json, atomic_write_text
from llmtune.reporting.build import build_report
from llmtune.reporting.charts import draw_interval, interval_limit
from llmtune.reporting.html import make_environment
from llmtune.reporting.numbers import Unit, format_count, format_p, unit_of_metric, without_nan
from llmtune.reporting.run_results import Models, current_results, read_resampling, read_results
from llmtune.reporting.suites import place_of
from llmtune.runs.ledger import differences
from llmtune.runs.stage import deciding_knobs_of

MIN_RUNS = 3
ARMS = ("base", "tuned")
COUNTS = ("rows_read", "rows_kept", "examples")

Arms = Mapping[str, ArmResult]


@dataclass(frozen=True)
class SeedRun:
    """One of the trainings; `knobs` are those that decide the adapter, as nested JSON values."""

    run: RunDir
    knobs: Mapping[str, Any]


def open_seed_run(run_dir: Path) -> SeedRun:
    """Return a run with the knobs that decided its adapter, as its manifest records them."""
    run = RunDir(run_dir)
    return SeedRun(run, deciding_knobs_of(read_manifest(run).config))


@dataclass(frozen=True)
class SeedSuite:
    """One suite: the change from base to tuned in every training, and what holds over all of them.

    `changes` and `tuned` are by training, `difference` is the mean of the changes. (low, high) is
    the interval over trainings and items, `items_alone` that of the mean change over items only.
    `spread` is the standard deviation of the changes between trainings.
    """

    name: str
    role: str
    metric: str
    higher_is_better: bool
    n: int
    base: float
    tuned: tuple[float, ...]
    changes: tuple[float, ...]
    difference: float
    low: float
    high: float
    p_value: float
    items_alone: tuple[float, float]
    spread: float
    holm_p: float = 1.0

    @property
    def unit(self) -> Unit:
        """How this suite's scores are written."""
        return unit_of_metric(self.metric)

    @property
    def gain(self) -> tuple[float, float, float]:
        """The difference and its interval, turned so that positive is better."""
        if self.higher_is_better:
            return self.difference, self.low, self.high
        return -self.difference, -self.high, -self.low

    def outcome(self, significance: float) -> str:
        """Return `better`, `worse`, or that no difference is shown over trainings and items."""
        _, low, high = self.gain
        if self.holm_p > significance or low <= 0 <= high:
            return "no difference shown"
        return "better" if low > 0 else "worse"


@dataclass(frozen=True)
class SeedStudy:
    """What several trainings of one recipe have in common, and in what they differ."""

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    verdicts: tuple[str, ...]
    suites: tuple[SeedSuite, ...]
    resampling: Resampling

    @property
    def significance(self) -> float:
        """The level that Holm-adjusted p-values are held against."""
        return 1 - self.resampling.confidence

    def as_json(self) -> dict[str, Any]:
        """Return the study for scripts."""
        runs = [
            {"run": name, "seed": seed, "verdict": verdict}
            for name, seed, verdict in zip(self.names, self.seeds, self.verdicts, strict=True)
        ]
        suites = {
            suite.name: asdict(suite) | {"outcome": suite.outcome(self.significance)}
            for suite in self.suites
        }
        statistics = asdict(self.resampling)
        values: dict[str, Any] = without_nan(
            {"format": 1, "runs": runs, "suites": suites, "statistics": statistics}
        )
        return values


def compare_seeds(runs: Sequence[SeedRun]) -> SeedStudy:
    """Compare tuned with base over several trainings of one recipe, on every suite all have.

    Raises:
        LlmtuneError: fewer than three runs, two of the same seed, anything but the seed differs in
            what decided their adapters, or they share no suite; each is named.
    """
    names = tell_apart([each.run.path for each in runs])
    if len(runs) < MIN_RUNS:
        raise LlmtuneError(
            f"{len(runs)} runs: the noise of training needs {MIN_RUNS} seeds or more"
        )
    manifests = [read_manifest(each.run) for each in runs]
    _require_one_recipe(runs, manifests)
    results = [_results(each.run, manifest) for each, manifest in zip(runs, manifests, strict=True)]
    shared = [name for name in results[0] if all(name in found for found in results)]
    if not shared:
        raise LlmtuneError(
            f"{', '.join(names)} have no suite on which base and tuned model were scored in all of "
            "them; evaluate each with: llmtune eval RUN"
        )
    resampling = read_resampling(manifests[0].config)
    suites = [_measure([found[name] for found in results], resampling) for name in shared]
    return SeedStudy(
        names=names,
        seeds=tuple(int(each.knobs["seed"]) for each in runs),
        verdicts=tuple(build_report(each.run).verdict.name for each in runs),
        suites=tuple(sorted(_adjust(suites), key=lambda suite: place_of(suite.role, suite.name))),
        resampling=resampling,
    )


def _measure(by_training: Sequence[Arms], resampling: Resampling) -> SeedSuite:
    first = by_training[0]["tuned"]
    rows, weights, clusters = [], None, None
    order: list[str] | None = None
    for arms in by_training:
        require_same_recipe(first, arms["tuned"], ())
        require_same_recipe(arms["base"], arms["tuned"], ())
        before, after = pair_items(arms["base"], arms["tuned"])
        scores = {old.id: new.score - old.score for old, new in zip(before, after, strict=True)}
        if order is None:
            order = list(scores)
            weights, clusters = np.array([item.weight for item in before]), cluster_names(before)
        if set(order) != set(scores):
            raise LlmtuneError(f"{first.suite}: the runs were scored on different items")
        rows.append([scores[name] for name in order])
    assert weights is not None and order is not None
    differences = np.array(rows)
    means = np.average(differences, axis=1, weights=weights)
    options: dict[str, Any] = {
        "weights": None if (weights == 1).all() else weights,
        "clusters": clusters,
        **asdict(resampling),
    }
    found = two_level_bootstrap(differences, **options)
    items = paired_bootstrap(differences.mean(0), **options)
    return SeedSuite(
        name=first.suite,
        role=first.role,
        metric=first.metric,
        higher_is_better=first.higher_is_better,
        n=len(order),
        base=float(np.mean([arms["base"].mean for arms in by_training])),
        tuned=tuple(arms["tuned"].mean for arms in by_training),
        changes=tuple(means.tolist()),
        difference=float(means.mean()),
        low=found.low,
        high=found.high,
        p_value=found.p_value,
        items_alone=(items.low, items.high),
        spread=float(means.std(ddof=1)),
    )


def _adjust(suites: Sequence[SeedSuite]) -> list[SeedSuite]:
    """Return the suites with their p adjusted over the suites of the same role."""
    adjusted: list[SeedSuite] = []
    for role in dict.fromkeys(suite.role for suite in suites):
        mine = [suite for suite in suites if suite.role == role]
        p_values = holm([suite.p_value for suite in mine])
        adjusted += [replace(s, holm_p=p) for s, p in zip(mine, p_values, strict=True)]
    return adjusted


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
            f"a different {name}"
            for name, of in (("base", _base), ("starting adapter", _start), ("rows", _rows))
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
    return (manifest.stages.get("train", {}).get("inputs") or {}).get("start")


def _rows(manifest: Manifest) -> object:
    """Return the rows of each source as they were counted; their order is the seed's."""
    return {
        split: [[source.get(key) for key in COUNTS] for source in found.get("sources", [])]
        for split, found in manifest.data.items()
    }


def _results(run: RunDir, manifest: Manifest) -> dict[str, Arms]:
    is_wanted = current_results(run, manifest, Models.of_run(run, manifest))
    results = read_results(run.evaluations_dir, is_wanted=is_wanted)
    return {name: arms for name, arms in results.items() if all(arm in arms for arm in ARMS)}


PAGE_NAME = "seeds.html"


@dataclass(frozen=True)
class ShownSuite:
    """One suite of the study with its interval drawn and its outcome in words."""

    suite: SeedSuite
    plot: Markup
    outcome: str


def write_seeds(study: SeedStudy, out_dir: Path) -> Path:
    """Write `seeds.html` and `seeds.json` into a directory and return the page's path."""
    page = out_dir / PAGE_NAME
    atomic_write_json(page.with_suffix(".json"), study.as_json())
    atomic_write_text(page, render_seeds(study))
    return page


def render_seeds(study: SeedStudy) -> str:
    """Return the page; it asks for nothing from outside."""
    limits: dict[Unit, float] = {}
    for unit in {suite.unit for suite in study.suites}:
        ends = [end for suite in study.suites if suite.unit == unit for end in suite.gain]
        limits[unit] = interval_limit(ends)
    shown = [
        ShownSuite(
            suite,
            draw_interval(*suite.gain, limit=limits[suite.unit]),
            suite.outcome(study.significance),
        )
        for suite in study.suites
    ]
    return make_environment().get_template("seeds.html.j2").render(study=study, shown=shown)


def render_seeds_table(study: SeedStudy) -> RenderableType:
    """Return the runs with their verdicts, and the table, to print; it fits 80 columns."""
    percent = f"{study.resampling.confidence * 100:g} %"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=True)
    table.add_column("suite", overflow="fold")
    for name in ("n", "base", "tuned", "between seeds"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column(f"change, {percent} with seeds", justify="right", no_wrap=True)
    table.add_column("Holm p", justify="right", no_wrap=True)
    for suite in study.suites:
        unit = suite.unit
        table.add_row(
            Text(suite.name),
            format_count(suite.n),
            unit.score(suite.base),
            unit.score(sum(suite.tuned) / len(suite.tuned)),
            f"± {unit.bare_size(suite.spread)}",
            f"{unit.change(suite.difference)} {unit.interval(suite.low, suite.high)}",
            format_p(suite.holm_p),
        )
    runs = zip(study.names, study.seeds, study.verdicts, strict=True)
    lines = [Text(f"{name}, seed {seed}: {verdict}") for name, seed, verdict in runs]
    return Group(*lines, table)
