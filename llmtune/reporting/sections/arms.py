"""Every other way to the same end on the same items: prompts, a probe, strengths, another model."""

from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from llmtune.reporting.arms import FEW_SHOT, split_name
from llmtune.reporting.figures import draw_interval, interval_limit
from llmtune.reporting.report import Report
from llmtune.reporting.suites import Change, SuiteReport


@dataclass(frozen=True)
class ArmRow:
    """One arm on a suite: its score, how it stands over the base, and how tuned stands over it."""

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


def build(report: Report) -> dict[str, Any] | None:
    """Return a table for every suite but the general ones that has an arm beside the main three."""
    tables = [(s, arm_rows(s)) for s in report.suites if s.rivals and s.role != "general"]
    return {"tables": tables} if tables else None


def arm_rows(suite: SuiteReport) -> list[ArmRow]:
    """Return a suite's arms; single draws are left out where their mean is there."""
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


def _over_base(suite: SuiteReport, name: str) -> Change | None:
    if name == "tuned":
        return suite.change
    rival = suite.rivals.get(name)
    return rival.over_base if rival else None


def _tuned_over(suite: SuiteReport, name: str) -> Change | None:
    if name == "base":
        return suite.change
    if name == "merged" and suite.merged_change is not None:
        return _turned(suite.merged_change)
    rival = suite.rivals.get(name)
    return rival.tuned_over if rival else None


def _turned(change: Change) -> Change:
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
        parts.append(f"{about['demonstration_tokens']:.0f} tokens more a request")
    if about.get("layer") is not None:
        parts.append(f"layer {about['layer']}, {about.get('pooling', '')} states".strip())
    if about.get("file"):
        parts.append(str(about["file"]).rpartition("/")[2])
    if rival and rival.n != suite.n:
        parts.append(f"{rival.n} items in common")
    if rival and rival.gap_closed is not None:
        parts.append(f"tuning closed {100 * rival.gap_closed:.0f} % of its lead")
    return ", ".join(parts)
