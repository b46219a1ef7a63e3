"""Score suites on the arms of one loaded model, finished results read instead of recomputed."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from llmtune.data.template import template_fingerprint
from llmtune.errors import LlmtuneError
from llmtune.evaluation.main_arms import WITHOUT_ADAPTER, kind_among
from llmtune.evaluation.prompt_file import PromptFile
from llmtune.evaluation.results import (
    ArmResult,
    ItemScore,
    Recipe,
    arm_result_path,
    cluster_names,
    finite_or_none,
    read_arm_result,
    save_arm_result,
)
from llmtune.evaluation.stats import standard_error
from llmtune.evaluation.tasks.base import Demonstration, Scoring, Suite
from llmtune.io.fingerprint import JsonObject, hash_json
from llmtune.io.progress import ProgressBar
from llmtune.models.live import LiveModel
from llmtune.scoring.batches import choose_token_budget
from llmtune.scoring.live import as_arm

log = logging.getLogger("llmtune")

NOTHING: Mapping[str, Any] = MappingProxyType({})
BASE_ARM = "base"
NOT_SCORING = {"name", "description", "items", "id", "slices", "limit", "role"}
"""Suite keys that change no score; items and limit are covered by the items' fingerprint."""


@dataclass(frozen=True)
class Progress:
    """`done` of `total` items of a suite are scored on an arm."""

    suite: str
    arm: str
    done: int
    total: int


@dataclass(frozen=True)
class ScoringSettings:
    """How items are scored; `token_budget` None chooses by the device."""

    token_budget: int | None = None
    demonstrations: tuple[Demonstration, ...] = ()
    prompt: PromptFile | None = None
    on_progress: Callable[[Progress], None] | None = None


DEFAULT_SETTINGS = ScoringSettings()


@dataclass(frozen=True)
class ArmPlan:
    """One arm on one suite: its items, how they are asked, and facts for the result's `about`.

    `strength` is for arms of the tuned model at a strength other than 1.
    """

    arm: str
    suite: Suite
    settings: ScoringSettings = DEFAULT_SETTINGS
    about: Mapping[str, Any] = field(default_factory=dict)
    strength: float | None = None

    @property
    def loaded_arm(self) -> str | None:
        """The arm of the loaded model that answers; None is the model as it is."""
        return BASE_ARM if kind_among(WITHOUT_ADAPTER, self.arm) else None


def scoring_settings(budget: int | Literal["auto"]) -> ScoringSettings:
    """Return how items are scored, with progress to the log."""
    return ScoringSettings(
        token_budget=None if budget == "auto" else budget, on_progress=ProgressLog()
    )


class ProgressLog:
    """Shows how far a suite is, and says so when it ends."""

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None
        self._what = ""

    def __call__(self, progress: Progress) -> None:
        """Renew the bar; log a line once the arm is done."""
        what = f"evaluate: {progress.suite}, {progress.arm}"
        if self._bar is None or what != self._what:
            self._bar, self._what = ProgressBar(what, progress.total), what
        self._bar.update(progress.done)
        if progress.done == progress.total:
            self._bar.close()
            log.info("%s", self._bar.line())
            self._bar = None


def evaluate_arms(
    scored: LiveModel,
    suites: Sequence[Suite],
    *,
    arms: Sequence[str] = (BASE_ARM, "tuned"),
    results_dir: Path | None = None,
    reuse: bool = True,
    settings: ScoringSettings = DEFAULT_SETTINGS,
) -> dict[str, dict[str, ArmResult]]:
    """Score every suite on every arm of one loaded model.

    `base` on a model with an adapter is that model with the adapter switched off (its identity then
    has no adapter); any other arm is the model as it is.

    Args:
        results_dir: results are kept here as `<suite>.<arm>.json`, each written when it is
            finished; one that is there with the same recipe and model is read instead.
        reuse: whether such results are read; False scores every suite again.

    Returns:
        suite name -> arm -> result.

    Raises:
        LlmtuneError: two suites of one name, or a suite that the model cannot be asked.
    """
    names = [suite.name for suite in suites]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise LlmtuneError(f"two suites are named {repeated[0]!r}; rename one")
    results: dict[str, dict[str, ArmResult]] = {name: {} for name in names}
    for arm in arms:
        for suite in suites:
            plan = ArmPlan(arm, suite, settings)
            result = None
            if results_dir is not None and reuse:
                result = read_finished(results_dir, scored, plan)
            if result is None:
                result = score_plan(scored, plan)
                if results_dir is not None:
                    save_arm_result(result, results_dir)
            results[suite.name][arm] = result
    return results


def score_plan(scored: LiveModel, plan: ArmPlan) -> ArmResult:
    """Score one suite as one arm; the model is afterwards as it was.

    Raises:
        LlmtuneError: a chat suite without a chat template, an item too long for the model,
            choices of which one begins another, or an adapter that has no such strength.
    """
    with as_arm(scored, plan.loaded_arm, strength=plan.strength) as answering:
        return evaluate_suite(
            answering, plan.suite, arm=plan.arm, settings=plan.settings, about=plan.about
        )


def read_finished(results_dir: Path, scored: LiveModel, plan: ArmPlan) -> ArmResult | None:
    """Return the kept result of the same recipe and model, or None."""
    path = arm_result_path(results_dir, plan.suite.name, plan.arm)
    if not path.is_file():
        return None
    try:
        result = read_arm_result(path)
    except LlmtuneError:
        return None  # half a result, or one of a different version: it is computed again
    recipe = build_recipe(scored, plan.suite, plan.settings)
    identity = scored.identity_as(plan.loaded_arm, plan.strength)
    is_same = result.recipe_hash == hash_json(recipe)
    return result if is_same and result.model == identity.as_dict() else None


def evaluate_suite(
    scored: LiveModel,
    suite: Suite,
    *,
    arm: str,
    settings: ScoringSettings = DEFAULT_SETTINGS,
    about: Mapping[str, Any] = NOTHING,
) -> ArmResult:
    """Score one suite with the model as it is; `about` is kept in the result.

    Raises:
        LlmtuneError: a chat suite without a chat template, an item too long for the model, or
            choices of which one begins another.
    """
    started = time.perf_counter()
    total = len(suite.items)
    if settings.on_progress is not None:
        settings.on_progress(Progress(suite.name, arm, 0, total))

    def report(done: int) -> None:
        if settings.on_progress is not None:
            settings.on_progress(Progress(suite.name, arm, done, total))

    return summarize_items(
        suite,
        arm,
        score_items(scored, suite, settings, report),
        recipe=build_recipe(scored, suite, settings),
        model=scored.identity.as_dict(),
        seconds=time.perf_counter() - started,
        about=about,
    )


def score_items(
    scored: LiveModel, suite: Suite, settings: ScoringSettings, report: Callable[[int], None]
) -> list[ItemScore]:
    """Return the score of each item, asked of the model as it is.

    Args:
        report: called with the number of items that are done.
    """
    budget = settings.token_budget or choose_token_budget(scored.model)
    asked = suite if settings.prompt is None else settings.prompt.ask(suite)
    return asked.config.score(scored, asked, Scoring(budget, settings.demonstrations, report))


def summarize_items(  # noqa: PLR0913 (the parts of one result)
    suite: Suite,
    arm: str,
    items: Sequence[ItemScore],
    *,
    recipe: Recipe,
    model: JsonObject,
    seconds: float,
    about: Mapping[str, Any] = NOTHING,
) -> ArmResult:
    """Return an arm's result from its items' scores."""
    scores = np.array([item.score for item in items])
    weights = np.array([item.weight for item in items])
    weighing = None if (weights == 1).all() else weights
    error = standard_error(scores, weights=weighing, clusters=cluster_names(items))
    metric = suite.config.chosen_metric
    return ArmResult(
        suite=suite.name,
        task=suite.task,
        role=suite.role,
        description=suite.description,
        arm=arm,
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        n=len(items),
        mean=float(np.average(scores, weights=weights)),
        standard_error=finite_or_none(error),
        unparseable=sum(not item.parsed for item in items),
        majority=suite.config.majority(suite.items),
        chance=suite.config.chance(suite.items),
        recipe=recipe,
        recipe_hash=hash_json(recipe),
        model=model,
        seconds=seconds,
        items=tuple(items),
        about=dict(about),
        also=suite.config.describe(items),
    )


def build_recipe(
    scored: LiveModel, suite: Suite, settings: ScoringSettings = DEFAULT_SETTINGS
) -> Recipe:
    """Return everything that must be the same for two results to be comparable."""
    config = suite.config.model_dump(mode="json", exclude=NOT_SCORING)
    template = template_fingerprint(scored.tokenizer).to_json() if config.get("chat") else None
    identity = scored.identity
    recipe: Recipe = {
        "items": suite.items_fingerprint,
        "num_items": suite.num_whole,
        "scoring": config,
        "template": hash_json(template),
        "demonstrations": hash_json([asdict(shown) for shown in settings.demonstrations]),
        "base": identity.base,
        "precision": {"dtype": identity.dtype, "quantization": identity.quantization},
        "versions": {name: _installed(name) for name in ("llmtune", "torch", "transformers")},
    }
    if len(suite.items) < suite.num_whole:
        recipe["selection"] = hash_json([item.id for item in suite.items])
    if facts := suite.config.recipe_facts():
        recipe["metric"] = facts
    if settings.prompt is not None:
        recipe["prompt"] = settings.prompt.fingerprint
    return recipe


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
