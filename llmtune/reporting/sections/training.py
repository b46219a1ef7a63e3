"""The loss over the steps, the gauge of forgetting, and what everything cost."""

from typing import Any

from llmtune.evaluation.compare import arm_kind
from llmtune.reporting.arms import split_name
from llmtune.reporting.cost import Cost
from llmtune.reporting.facts import Fact, format_label
from llmtune.reporting.numbers import format_bytes, format_count
from llmtune.reporting.plots import draw_kl_gauge, draw_loss_curve
from llmtune.reporting.report import Report


def build(report: Report) -> dict[str, Any] | None:
    """Return the curve, the gauge and the ledger; what is not known is left out."""
    curve, cost = report.curve, report.cost
    facts = _facts(cost)
    if curve.is_empty and not facts and not cost.seconds:
        return None
    return {
        "curve": None if curve.is_empty else draw_loss_curve(curve.train, curve.evaluation),
        "gauge": draw_kl_gauge(curve.kl_to_base) if curve.kl_to_base else None,
        "facts": facts,
        "measures": [(_label(name), spent) for name, spent in cost.measures.items()],
        "break_even": cost.break_even,
    }


def _facts(cost: Cost) -> tuple[Fact, ...]:
    """Return what is known of tokens and sizes; time and memory have their own table."""
    known = (
        ("optimizer steps", cost.steps, format_count),
        ("tokens read in training", cost.tokens, format_count),
        ("tokens trained on", cost.trained_tokens, format_count),
        ("tokens per second", cost.tokens_per_second, format_count),
        ("adapter on disk", cost.adapter_bytes, format_bytes),
        ("merged model on disk", cost.merged_bytes, format_bytes),
    )
    return tuple(Fact(name, write(value)) for name, value, write in known if value is not None)


def _label(name: str) -> str:
    words = {"few-shot": "few-shot draws", "strength": "other strengths", "prompt": "own prompts"}
    if name in words:
        return words[name]
    is_arm = arm_kind(name) in ("base", "tuned", "merged", "probe", "other")
    return split_name(name).label.lower() if is_arm else format_label(name)
