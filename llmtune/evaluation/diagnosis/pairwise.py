"""Whose written answers a judge prefers: what ships, or what was there before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmtune.errors import LlmtuneError
from llmtune.evaluation.diagnosis.base import Diagnosis, Given, Planned
from llmtune.evaluation.diagnosis.judged_pairs import (
    WHERE,
    JudgedSuite,
    PairwiseConfig,
    PairwiseResult,
)
from llmtune.evaluation.diagnosis.shown import Facts, Paragraph, Section, Table, Writer
from llmtune.evaluation.endpoint import Endpoint

if TYPE_CHECKING:
    from llmtune.evaluation.config import EvaluateConfig
    from llmtune.evaluation.tasks.base import Suite

DOUBTFUL_AGREEMENT = 0.7
"""A judge that says the same in both orders less often than this is not to be relied on."""


class Pairwise(Diagnosis[PairwiseResult]):
    """Which of two written answers a judge prefers, asked in both orders."""

    name = "pairwise"
    what = "which answers a judge prefers"
    help = "A judge that compares written answers, behind an endpoint; null asks nobody"
    command = "llmtune eval RUN evaluate.pairwise='{url: ..., model: ...}'"
    knobs = PairwiseConfig
    needs_rows = False
    needs_adapter = False
    needs_results = True
    number_names = ("win_rate",)
    result = PairwiseResult

    def check(self, knobs: EvaluateConfig, suites: Sequence[Suite]) -> None:
        """Refuse a judge that cannot be asked, and suites without written answers."""
        asked = judge_of(knobs)
        if asked is None:
            return
        Endpoint(WHERE, asked)
        written = [suite.name for suite in suites if suite.config.WRITES_ANSWERS]
        unknown = [name for name in asked.suites or () if name not in written]
        if unknown or not written:
            raise LlmtuneError(
                f"{WHERE}.suites: {', '.join(unknown) or 'none'}: expected suites whose answers "
                f"are written out, not chosen; this evaluation has "
                f"{', '.join(written) or 'none'}"
            )

    def plan(self, given: Given) -> Planned[PairwiseResult]:
        """Plan to ask the judge; what it said of the same answers is not asked again."""
        from llmtune.evaluation.diagnosis.pairwise_ask import ask_judge

        asked = judge_of(given.knobs)
        assert asked is not None, "planned only if it is configured"
        return Planned(PairwiseResult, {}, 0, lambda: ask_judge(given, asked))

    def refusal(self, found: PairwiseResult) -> str | None:
        """Say that nothing could be compared."""
        return None if found.suites else "no suite has written answers of two models"

    def is_missing(
        self, found: PairwiseResult | None, arms: set[str], *, has_choices: bool
    ) -> bool:
        """Return False: nobody is asked unless a judge is configured."""
        return False

    def numbers(self, found: PairwiseResult) -> dict[str, float | None]:
        """Return the lowest win rate of the suites."""
        rates = [each.win_rate for each in found.suites if each.win_rate is not None]
        return {"win_rate": min(rates, default=None)}

    def caveats(self, found: PairwiseResult) -> tuple[str, ...]:
        """Say if the judge clearly prefers the answers from before."""
        return tuple(
            f"{suite.name}: the judge {found.model} prefers the answers of the {suite.compared[0]} "
            f"model to those of the {suite.compared[1]} model (win rate {100 * suite.win_rate:.1f} "
            f"%, {100 * found.confidence:g} % interval {100 * suite.low:.1f} to "
            f"{100 * suite.high:.1f} %)."
            for suite in found.suites
            if suite.win_rate is not None and suite.low is not None and suite.high is not None
            if suite.is_enough and suite.high < 0.5
        )

    def section(self, found: PairwiseResult, facts: Facts) -> Section | None:
        """Show win rates, how far the judge agrees with itself, and what it cost."""
        if not found.suites:
            return None
        write = facts.write
        rows = tuple(_row(suite, write) for suite in found.suites)
        head = (
            *("Suite", "Answers", "Better", "Even", "Worse", "Win rate", "Interval"),
            *("Same in both orders", "First preferred"),
        )
        return Section(
            "Which answers does a judge prefer?",
            (
                Paragraph(
                    f"{found.model} at {found.endpoint} was shown two answers to each question, "
                    "without saying whose they are, once in each order. Asked was: "
                    f"{found.criterion} {_cost(found, write)}"
                ),
                Table(rows, head),
                *(Paragraph(text) for suite in found.suites for text in _remarks(suite, write)),
                Paragraph(
                    "An answer of what ships counts 1 if it is preferred, half if neither is, and "
                    "the two orders are averaged: at 50 % neither model is preferred. A judge's "
                    "preference is not correctness; it does not decide the verdict.",
                    is_note=True,
                ),
            ),
        )

    def summary_lines(self, found: PairwiseResult, write: Writer) -> list[str]:
        """Give the win rates."""
        return [
            f"Judged by {found.model}, {suite.name}: win rate {write.share(suite.win_rate)} "
            f"({write.share(suite.low)} to {write.share(suite.high)})."
            for suite in found.suites
            if suite.win_rate is not None
        ]


def judge_of(knobs: EvaluateConfig) -> PairwiseConfig | None:
    """Return the judge that an evaluation names."""
    found = getattr(knobs, Pairwise.name)
    assert found is None or isinstance(found, PairwiseConfig)
    return found


def _row(suite: JudgedSuite, write: Writer) -> tuple[str, ...]:
    before, after = suite.compared
    known = suite.win_rate is not None
    return (
        suite.name,
        f"{after} against {before}",
        write.count(suite.count(0.6, 1.0)),
        write.count(suite.count(0.5, 0.5)),
        write.count(suite.count(0.0, 0.4)),
        write.share(suite.win_rate) if known else "–",
        f"{write.share(suite.low)} to {write.share(suite.high)}" if known else "–",
        write.share(suite.agreement) if suite.agreement is not None else "–",
        write.share(suite.first_share) if suite.first_share is not None else "–",
    )


def _remarks(suite: JudgedSuite, write: Writer) -> Iterator[str]:
    """Yield what limits what a suite's win rate says."""
    if suite.num_unread:
        yield (
            f"{suite.name}: {write.count(suite.num_unread)} of {write.count(len(suite.pairs))} "
            "pairs are left out because a reply was not a verdict; had what ships lost all of "
            f"them, its win rate would be {write.share(suite.worst)}."
        )
    if same := sum(pair.same for pair in suite.pairs):
        yield (
            f"{suite.name}: {write.count(same)} pairs of equal answers count as even; the judge "
            "was not asked."
        )
    if suite.agreement is not None and suite.agreement < DOUBTFUL_AGREEMENT:
        yield (
            f"{suite.name}: the judge contradicts itself when the order is turned around in "
            f"{write.share(1 - suite.agreement)} of the pairs: do not rely on it."
        )
    if not suite.is_enough:
        yield f"{suite.name}: too few pairs for a claim."
    elif suite.low is not None and suite.high is not None and suite.low <= 0.5 <= suite.high:
        yield f"{suite.name}: no preference is shown."


def _cost(found: PairwiseResult, write: Writer) -> str:
    tokens = ""
    if found.input_tokens is not None and found.output_tokens is not None:
        tokens = (
            f" of {write.number(found.input_tokens, 3)} tokens read and "
            f"{write.number(found.output_tokens, 3)} written on average"
        )
    price = "" if found.price is None else f", {write.number(found.price, 3)} in all"
    return f"That took {write.count(found.requests)} requests{tokens}{price}."
