"""The stored results of a run as it is now: which count, the mean of draws, a part of the items."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.errors import LlmtuneError
from llmtune.evaluation.compare import arm_kind
from llmtune.evaluation.diagnosis.config import ALTERNATIVES
from llmtune.evaluation.main_arms import AFTER, MAIN_ARMS, OTHER, WITHOUT_ADAPTER
from llmtune.evaluation.results import (
    LM_EVAL_TASK,
    ArmResult,
    ItemScore,
    cluster_names,
    finite_or_none,
    read_arm_result,
)
from llmtune.evaluation.stats import Resampling, standard_error
from llmtune.io.manifest import Manifest
from llmtune.io.run_dir import RunDir
from llmtune.models.checkpoint import Checkpoint
from llmtune.reporting.sections.arms import FEW_SHOT, sort_arms

Results = Mapping[str, Mapping[str, ArmResult]]
"""Suite -> arm -> result."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Models:
    """Fingerprints of the models that a run's directory holds; None if there is none."""

    base: str | None
    adapter: str | None

    @classmethod
    def of_run(cls, run: RunDir, manifest: Manifest) -> "Models":
        """Read the base from the manifest and the adapter from its files."""
        try:
            adapter = adapter_fingerprint(run.adapter_dir)
        except LlmtuneError:
            adapter = None  # not trained yet, or removed: then no result belongs to it
        return cls(manifest.base.get("fingerprint"), adapter)


def read_resampling(config: Mapping[str, Any]) -> Resampling:
    """Return how a run's config wants its intervals made."""
    section, default = config.get("evaluate") or {}, Resampling()
    return Resampling(
        confidence=section.get("confidence", default.confidence),
        samples=section.get("bootstrap_samples", default.samples),
        seed=section.get("seed", default.seed),
    )


def read_results(
    evaluations_dir: Path, *, is_wanted: Callable[[ArmResult], bool]
) -> dict[str, dict[str, ArmResult]]:
    """Read the results in a directory as suite -> arm -> result, with the mean of few-shot draws.

    Args:
        is_wanted: whether a result is of this run as it is now; others are left from earlier
            evaluations and not shown. So are arms made on other items than their base.

    Raises:
        LlmtuneError: a file is not a result.
    """
    results: dict[str, dict[str, ArmResult]] = {}
    for path in sorted(evaluations_dir.glob("*.json")):
        result = read_arm_result(path)
        if is_wanted(result):
            results.setdefault(result.suite, {})[result.arm] = result
    return {name: _pool_draws(_on_same_items(arms)) for name, arms in results.items()}


def read_current_results(run: RunDir, manifest: Manifest) -> dict[str, dict[str, ArmResult]]:
    """Read the results of a run as it is now: suite -> arm -> result.

    Raises:
        LlmtuneError: a file is not a result.
    """
    is_wanted = current_results(run, manifest, Models.of_run(run, manifest))
    return read_results(run.evaluations_dir, is_wanted=is_wanted)


def current_results(run: RunDir, manifest: Manifest, models: Models) -> Callable[[ArmResult], bool]:
    """Return what tells a result of the run as it is now from one that was left behind.

    After a finished evaluation these are the arms and suites that it made, but for those of an
    adapter or a merged model that was replaced by a different one since. Without one they are
    those of the models on disk: base and tuned of the manifest's base, tuned with the saved
    adapter, merged with the saved weights. Other arms may have been measured later;
    they count if they are of the models on disk, on a suite that was evaluated.
    """
    merged = _merged_fingerprint(run)
    is_of_models = _models_on_disk(models, merged)
    if not is_finished(manifest, "evaluate"):
        return is_of_models
    is_replaced = _is_of_replaced(models, merged)
    made = (manifest.stages["evaluate"].get("result") or {}).get("suites", {})

    def is_current(result: ArmResult) -> bool:
        arms = made.get(result.suite, {})
        if result.arm in arms:
            return not is_replaced(result)
        if arm_kind(result.arm) in {arm_kind(arm) for arm in arms}:
            return False  # of an earlier call with other knobs: a draw or a strength too many
        # Tasks of lm-evaluation-harness and further arms are run outside the stage.
        is_beside = result.task == LM_EVAL_TASK or arm_kind(result.arm) not in MAIN_ARMS
        is_of_suite = result.task == LM_EVAL_TASK or result.suite in made
        return is_beside and is_of_suite and is_of_models(result)

    return is_current


def is_finished(manifest: Manifest, stage: str) -> bool:
    """Return whether a stage ended well and none before it was begun again since."""
    return bool(manifest.record(stage).get("finished"))


def restrict(result: ArmResult, wanted: set[str]) -> ArmResult:
    """Return a result on the items with these ids alone, in its own order."""
    items = tuple(item for item in result.items if item.id in wanted)
    scores, weights = _scores(items)
    return replace(
        result,
        n=len(items),
        mean=float(np.average(scores, weights=weights)),
        standard_error=_error(items),
        unparseable=sum(not item.parsed for item in items),
        items=items,
        recipe={**result.recipe, "num_items": result.recipe.get("num_items", result.n)},
    )


def _models_on_disk(models: Models, merged: str | None) -> Callable[[ArmResult], bool]:
    bare, tuned = (models.base, None), (models.base, models.adapter)
    identities = {
        **dict.fromkeys((*WITHOUT_ADAPTER, *ALTERNATIVES), bare if models.base else None),
        "tuned": tuned if models.adapter else None,
        "strength": tuned if models.adapter else None,
        "merged": (merged, None) if merged else None,
    }

    def is_of_models(result: ArmResult) -> bool:
        kind = arm_kind(result.arm)
        if kind == OTHER:
            return True  # a different model's answers do not depend on this run
        identity = (result.model.get("base"), result.model.get("adapter"))
        return identity == identities.get(kind)

    return is_of_models


def _is_of_replaced(models: Models, merged: str | None) -> Callable[[ArmResult], bool]:
    """Return what tells a result of an adapter or merged model that is now a different one.

    One that is no longer there at all was measured all the same.
    """

    def is_replaced(result: ArmResult) -> bool:
        # only a whole model that took the adapter's place in the chain has no adapter
        is_whole = result.arm in AFTER and result.model.get("adapter") is None
        key, now = ("base", merged) if is_whole else ("adapter", models.adapter)
        known = result.model.get(key)
        return known is not None and now is not None and known != now

    return is_replaced


def _merged_fingerprint(run: RunDir) -> str | None:
    """Return the fingerprint of the merged model on disk, if there is one."""
    is_merged = any(run.merged_dir.glob("*.safetensors"))
    return Checkpoint.open(run.merged_dir).fingerprint if is_merged else None


def _on_same_items(arms: dict[str, ArmResult]) -> dict[str, ArmResult]:
    main = arms.get("base") or arms.get("tuned")
    if main is None:
        return arms
    items = main.recipe.get("items")
    return {
        name: result
        for name, result in arms.items()
        if name in MAIN_ARMS or result.recipe.get("items") == items
    }


def _pool_draws(arms: Mapping[str, ArmResult]) -> dict[str, ArmResult]:
    """Return the arms with one more, `few-shot`: each item's mean score over the draws.

    With a single draw it is that draw.
    """
    draws = [arms[name] for name in sort_arms(list(arms)) if arm_kind(name) == FEW_SHOT]
    if not draws or FEW_SHOT in arms:
        return dict(arms)
    common = set.intersection(*({item.id for item in draw.items} for draw in draws))
    by_id = [{item.id: item for item in draw.items} for draw in draws]
    items = tuple(
        _mean_item([found[item.id] for found in by_id])
        for item in draws[0].items
        if item.id in common
    )
    scores, weights = _scores(items)
    pooled = replace(
        draws[0],
        arm=FEW_SHOT,
        n=len(items),
        mean=float(np.average(scores, weights=weights)),
        standard_error=_error(items),
        unparseable=round(float(np.mean([draw.unparseable for draw in draws]))),
        seconds=sum(draw.seconds for draw in draws),
        items=items,
        about={
            "shots": draws[0].about.get("shots"),
            "draws": {draw.arm: draw.mean for draw in draws},
            "demonstration_tokens": _mean_tokens(draws),
        },
    )
    return {**arms, FEW_SHOT: pooled}


def _mean_item(items: Sequence[ItemScore]) -> ItemScore:
    return replace(
        items[0],
        score=float(np.mean([item.score for item in items])),
        prediction=None,
        parsed=all(item.parsed for item in items),
        details={},
    )


def _mean_tokens(draws: Sequence[ArmResult]) -> float | None:
    found = [draw.about.get("demonstration_tokens") for draw in draws]
    known = [tokens for tokens in found if isinstance(tokens, int | float)]
    return sum(known) / len(known) if known else None


def _scores(items: Sequence[ItemScore]) -> tuple[FloatArray, FloatArray]:
    return np.array([item.score for item in items]), np.array([item.weight for item in items])


def _error(items: Sequence[ItemScore]) -> float | None:
    scores, weights = _scores(items)
    weighing = None if (weights == 1).all() else weights
    error = standard_error(scores, weights=weighing, clusters=cluster_names(items))
    return finite_or_none(error)
