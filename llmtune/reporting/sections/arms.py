"""The alternatives on the same items: prompts, a probe, strengths, a different model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

from markupsafe import Markup

from llmtune.evaluation.compare import arm_kind, compare_arms
from llmtune.evaluation.diagnosis.config import ALTERNATIVES
from llmtune.evaluation.main_arms import MAIN_ARMS, OTHER, kind_among
from llmtune.evaluation.results import ArmResult
from llmtune.evaluation.stats import Resampling
from llmtune.reporting.charts import draw_interval, interval_limit
from llmtune.reporting.suites import Change, Rival, SuiteReport

FEW_SHOT = "few-shot"
PROMPTING = (FEW_SHOT, "prompt")
"""Kinds of arms that leave the base as it is and only say more to it."""

ORDER = (
    *("original", "base", FEW_SHOT, "prompt"),
    *ALTERNATIVES,
    *("strength", "tuned", "merged", "other"),
)
KIND_LABELS = {
    "original": "Original, not quantized",
    "base": "Base, as it is",
    "tuned": "Tuned",
    "merged": "Merged model",
    **{name: alternative.label for name, alternative in ALTERNATIVES.items()},
}


@dataclass(frozen=True)
class ArmName:
    """An arm's name split up: `few-shot-2` is draw `2` of the kind `few-shot`."""

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


@dataclass(frozen=True)
class ArmRow:
    """One arm on a suite: its score, its change over the base, and that of tuned over it."""

    label: str
    n: int | None
    score: str
    unparseable: int
    over_base: Change | None
    tuned_over: Change | None
    mde: str
    plot: Markup | None
    note: str = ""
    is_tuned: bool = False


class ArmsSection(TypedDict):
    """What the template shows."""

    tables: list[tuple[SuiteReport, list[ArmRow]]]


def split_name(arm: str) -> ArmName:
    """Split an arm's name into its kind and the rest."""
    kind = arm_kind(arm)
    return ArmName(kind, arm.removeprefix(kind).removeprefix("-"))


def sort_arms(names: Sequence[str]) -> list[str]:
    """Return the names in the order of a table: the base first, then what was done to it."""

    def place(name: str) -> tuple[int, str]:
        kind = arm_kind(name)
        return (ORDER.index(kind) if kind in ORDER else len(ORDER), name)

    return sorted(names, key=place)


def measure_rivals(arms: Mapping[str, ArmResult], resampling: Resampling) -> dict[str, Rival]:
    """Compare every arm besides the main ones with base and tuned.

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
            over_base=Change.of(over_base) if over_base else None,
            tuned_over=Change.of(tuned_over) if tuned_over else None,
            mde=tuned_over.mde if tuned_over else None,
            gap_closed=gap_closed(over_base.gain, tuned_over.gain)
            if over_base and tuned_over and kind_among([OTHER], name)
            else None,
        )
    return rivals


def show_arms(suites: Sequence[SuiteReport]) -> ArmsSection | None:
    """Return a table for every target or transfer suite with an arm besides the main ones."""
    tables = [(s, arm_rows(s)) for s in suites if s.rivals and s.role != "general"]
    return {"tables": tables} if tables else None


def arm_rows(suite: SuiteReport) -> list[ArmRow]:
    """Return a suite's arms; single draws are left out if their mean is there."""
    compared = {name: _tuned_over(suite, name) for name in suite.arms}
    ends = [end for change in compared.values() if change for end in suite.gain(change)]
    limit = interval_limit(ends)
    draws = [n for n in suite.arms if split_name(n).kind == FEW_SHOT and split_name(n).rest]
    hidden = set(draws) if len(draws) > 1 else {FEW_SHOT}
    rows = []
    for name, arm in suite.arms.items():
        if name in hidden:
            continue
        change, rival = compared[name], suite.rivals.get(name)
        rows.append(
            ArmRow(
                label=split_name(name).label,
                n=arm.n,
                score=suite.unit.score(arm.mean),
                unparseable=arm.unparseable,
                over_base=_over_base(suite, name),
                tuned_over=change,
                mde=suite.unit.bare_size(rival.mde) if rival and rival.mde else "–",
                plot=draw_interval(*suite.gain(change), limit=limit) if change else None,
                note=_note(suite, name),
                is_tuned=name == "tuned",
            )
        )
    return rows


def gap_closed(over_base: float, tuned_over: float) -> float | None:
    """Return (tuned - base) / (arm - base) from two gains, if the arm leads the base."""
    return None if over_base <= 0 else 1 + tuned_over / over_base


def _over_base(suite: SuiteReport, name: str) -> Change | None:
    if name == "tuned":
        return suite.chain.get("training")
    if name == "original":
        return _turned(suite.chain.get("quantization"))
    rival = suite.rivals.get(name)
    return rival.over_base if rival else None


def _tuned_over(suite: SuiteReport, name: str) -> Change | None:
    if name == "base":
        return suite.chain.get("training")
    if name == "merged":
        return _turned(suite.chain.get("merging"))
    rival = suite.rivals.get(name)
    return rival.tuned_over if rival else None


def _turned(change: Change | None) -> Change | None:
    if change is None:
        return None
    return replace(change, difference=-change.difference, low=-change.high, high=-change.low)


def _note(suite: SuiteReport, name: str) -> str:
    about, unit = suite.arms[name].about, suite.unit
    rival = suite.rivals.get(name)
    parts = []
    if draws := about.get("draws"):
        values = sorted(draws.values(), reverse=suite.higher_is_better)
        parts.append("draws " + ", ".join(unit.score(value) for value in values))
    if about.get("shots"):
        parts.append(f"{about['shots']} shown")
    if about.get("demonstration_tokens"):
        parts.append(f"{about['demonstration_tokens']:.0f} more tokens per request")
    if about.get("layer") is not None:
        parts.append(f"layer {about['layer']}, {about.get('pooling', '')} states".strip())
    if about.get("endpoint"):
        parts.append(f"{about.get('model')} at {about['endpoint']}")
        if about.get("price_per_1000") is not None:
            parts.append(f"{about['price_per_1000']:.3g} per 1,000 requests")
        parts.append(f"{about.get('seconds_per_request', 0):.2g} s per request")
    if about.get("file"):
        parts.append(str(about["file"]).rpartition("/")[2])
    if rival and rival.n != suite.n:
        parts.append(f"{rival.n} items in common")
    if rival and rival.gap_closed is not None:
        parts.append(f"tuning closed {100 * rival.gap_closed:.0f} % of its lead")
    return ", ".join(parts)
