"""Evaluate suites on the arms of one loaded model, finished results read instead of recomputed."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from llmtune.data.template import template_fingerprint
from llmtune.errors import LlmtuneError
from llmtune.evaluation.metrics import METRICS
from llmtune.evaluation.requests import Demonstration
from llmtune.evaluation.results import (
    ArmResult,
    arm_result_path,
    finite_or_none,
    read_arm_result,
    save_arm_result,
)
from llmtune.evaluation.scored_model import ScoredModel
from llmtune.evaluation.stats import standard_error
from llmtune.evaluation.suite import Suite
from llmtune.evaluation.tasks import chance_accuracy, majority_accuracy, score_items
from llmtune.fingerprint import hash_json
from llmtune.scoring.batches import adapter_disabled, choose_token_budget, has_adapter

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
    on_progress: Callable[[Progress], None] | None = None


DEFAULT_SETTINGS = ScoringSettings()


def evaluate_arms(
    scored: ScoredModel,
    suites: Sequence[Suite],
    *,
    arms: Sequence[str] = (BASE_ARM, "tuned"),
    results_dir: Path | None = None,
    reuse: bool = True,
    settings: ScoringSettings = DEFAULT_SETTINGS,
) -> dict[str, dict[str, ArmResult]]:
    """Score every suite on every arm of one loaded model.

    `base` on a model with an adapter is that model with the adapter switched off (its identity then
    has no adapter); any other arm is the model as it stands.

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
        raise LlmtuneError(f"two suites are named {repeated[0]!r}: give one another `name`")
    results: dict[str, dict[str, ArmResult]] = {name: {} for name in names}
    for arm in arms:
        with _as_arm(scored, arm) as model:
            for suite in suites:
                result = None
                if results_dir is not None and reuse:
                    result = _read_finished(results_dir, model, suite, arm, settings)
                if result is None:
                    result = evaluate_suite(model, suite, arm=arm, settings=settings)
                    if results_dir is not None:
                        save_arm_result(result, results_dir)
                results[suite.name][arm] = result
    return results


@contextlib.contextmanager
def _as_arm(scored: ScoredModel, arm: str) -> Iterator[ScoredModel]:
    if arm != BASE_ARM:
        yield scored
        return
    base = replace(scored, identity=replace(scored.identity, adapter=None))
    with adapter_disabled(scored.model) if has_adapter(scored.model) else contextlib.nullcontext():
        yield base


def evaluate_suite(
    scored: ScoredModel,
    suite: Suite,
    *,
    arm: str,
    settings: ScoringSettings = DEFAULT_SETTINGS,
) -> ArmResult:
    """Score one suite with the model as it stands.

    Raises:
        LlmtuneError: a chat suite without a chat template, an item too long for the model, or
            choices of which one begins another.
    """
    started = time.perf_counter()
    total = len(suite.items)

    def report(done: int) -> None:
        if settings.on_progress is not None:
            settings.on_progress(Progress(suite.name, arm, done, total))

    budget = settings.token_budget or choose_token_budget(scored.model)
    items = score_items(scored, suite, settings.demonstrations, budget, report)
    scores = np.array([item.score for item in items])
    weights = np.array([item.weight for item in items])
    clusters = [item.cluster for item in items if item.cluster is not None] or None
    error = standard_error(
        scores, weights=None if (weights == 1).all() else weights, clusters=clusters
    )
    recipe = build_recipe(scored, suite, settings)
    metric = METRICS[suite.config.metric]
    return ArmResult(
        suite=suite.name,
        task=suite.task,
        role=suite.role,
        description=suite.description,
        arm=arm,
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        n=total,
        mean=float(np.average(scores, weights=weights)),
        standard_error=finite_or_none(error),
        unparseable=sum(not item.parsed for item in items),
        majority=majority_accuracy(suite),
        chance=chance_accuracy(suite),
        recipe=recipe,
        recipe_hash=hash_json(recipe),
        model=asdict(scored.identity),
        seconds=time.perf_counter() - started,
        items=tuple(items),
    )


def build_recipe(
    scored: ScoredModel, suite: Suite, settings: ScoringSettings = DEFAULT_SETTINGS
) -> dict:
    """Return everything that must be the same for two results to be comparable."""
    config = suite.config.model_dump(mode="json", exclude=NOT_SCORING)
    template = template_fingerprint(scored.tokenizer).to_json() if config.get("chat") else None
    identity = scored.identity
    recipe = {
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
    return recipe


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _read_finished(
    results_dir: Path, scored: ScoredModel, suite: Suite, arm: str, settings: ScoringSettings
) -> ArmResult | None:
    path = arm_result_path(results_dir, suite.name, arm)
    if not path.is_file():
        return None
    try:
        result = read_arm_result(path)
    except LlmtuneError:
        return None  # half a result, or another version's, is no result: it is computed again
    recipe = build_recipe(scored, suite, settings)
    same = result.recipe_hash == hash_json(recipe) and result.model == asdict(scored.identity)
    return result if same else None
