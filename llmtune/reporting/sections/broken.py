"""What broke: general suites, and what the diagnoses say about forgetting."""

import math
from collections.abc import Callable, Mapping
from typing import TypedDict

from llmtune.evaluation.answer_style import AnswerStyle
from llmtune.evaluation.diagnosis.shown import Section
from llmtune.reporting.report import Report
from llmtune.reporting.sections.diagnoses import show_forgetting
from llmtune.reporting.sections.slices import SliceTable, slice_tables
from llmtune.reporting.suites import SuiteReport


class BrokenSection(TypedDict):
    """What the template shows."""

    suites: list[tuple[SuiteReport, tuple[SliceTable, ...]]]
    sections: list[Section]
    perplexity: Callable[[float], float]
    answer_words: Mapping[str, str]


def show_broken(report: Report) -> BrokenSection | None:
    """Return what was measured of forgetting."""
    suites = [(suite, slice_tables(suite)) for suite in report.with_role("general")]
    is_diagnosed = any(
        diagnosis.is_about_forgetting and found is not None
        for diagnosis, found in report.diagnostics
    )
    if not suites and not is_diagnosed:
        return None
    return {
        "suites": suites,
        "sections": show_forgetting(report),
        "perplexity": math.exp,
        "answer_words": AnswerStyle.WORDS,
    }
