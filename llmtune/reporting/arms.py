"""The arms beside base, tuned and merged: their order, the mean of draws, how they compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmtune.evaluation.compare import (
    Comparison,
    Resampling,
    arm_kind,
    cluster_names,
    compare_arms,
)
from llmtune.evaluation.results import ArmResult, ItemScore, finite_or_none
from llmtune.evaluation.stats import standard_error
from llmtune.reporting.suites import Change, Rival

FEW_SHOT = "few-shot"
MAIN_ARMS = ("base", "tuned", "merged")
PROMPTING = (FEW_SHOT, "prompt")
"""Kinds of arms that leave the base as it is and only say more to it."""

ORDER = ("base", FEW_SHOT, "prompt", "probe", "strength", "tuned", "merged", "other")
KIND_LABELS = {
    "base": "Base, as it is",
    "tuned": "Tuned",
    "merged": "Merged model",
    "probe": "Linear probe on the base",
}


@dataclass(frozen=True)
class ArmName:
    """An arm's name taken apart: `few-shot-2` is draw `2` of the kind `few-shot`."""

    kind: str
    rest: str

    @property
    def label(self) -> str:
        """The arm in words."""
        if self.kind in KIND_LABELS:
            return KIND_LABELS[self.kind]
        if self.kind == FEW_SHOT:
            return f"Few-shot, draw {self.rest}" if self.rest else "Few-shot, mean of the draws"
        words = {"prompt": "Own prompt", "strength": "Strength", "other": "Other model"}
        return f"{words.get(self.kind, self.kind)} {self.rest}".strip()


def split_name(arm: str) -> ArmName:
    """Take an arm's name apart."""
    kind = arm_kind(arm)
    return ArmName(kind, arm.removeprefix(kind).removeprefix("-"))


def sort_arms(names: Sequence[str]) -> list[str]:
    """Return the names in the order of a table: the base first, then what was done to it."""

    def place(name: str) -> tuple[int, str]:
        kind = arm_kind(name)
        return (ORDER.index(kind) if kind in ORDER else len(ORDER), name)

    return sorted(names, key=place)


def pool_draws(arms: Mapping[str, ArmResult]) -> dict[str, ArmResult]:
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


def measure_rivals(arms: Mapping[str, ArmResult], resampling: Resampling) -> dict[str, Rival]:
    """Compare every arm beside base, tuned and merged with base and tuned.

    Raises:
        LlmtuneError: an arm was made by a recipe that its kind may not have.
    """
    base, tuned = arms.get("base"), arms.get("tuned")
    rivals = {}
    for name in sort_arms([name for name in arms if name not in MAIN_ARMS]):
        arm = arms[name]
        over_base = compare_arms(base, arm, resampling=resampling) if base else None
        tuned_over = compare_arms(arm, tuned, resampling=resampling) if tuned else None
        rivals[name] = Rival(
            n=tuned_over.n if tuned_over else arm.n,
            over_base=as_change(over_base),
            tuned_over=as_change(tuned_over),
            mde=tuned_over.mde if tuned_over else None,
            gap_closed=_gap_closed(over_base, tuned_over) if name.startswith("other") else None,
        )
    return rivals


def as_change(found: Comparison | None) -> Change | None:
    """Return a comparison's difference and interval, None where there is none."""
    if found is None:
        return None
    return Change(found.difference, found.low, found.high, found.p_value, found.standard_error)


def _gap_closed(over_base: Comparison | None, tuned_over: Comparison | None) -> float | None:
    """Return (tuned - base) / (arm - base), where the arm leads the base."""
    if over_base is None or tuned_over is None or over_base.gain <= 0:
        return None
    return 1 + tuned_over.gain / over_base.gain


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


def _scores(items: Sequence[ItemScore]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([item.score for item in items]), np.array([item.weight for item in items])


def _error(items: Sequence[ItemScore]) -> float | None:
    scores, weights = _scores(items)
    weighing = None if (weights == 1).all() else weights
    error = standard_error(scores, weights=weighing, clusters=cluster_names(items))
    return finite_or_none(error)
