"""Does generation still end by itself?"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from llmtune.evaluation.diagnosis.base import (
    Diagnosis,
    Diagnostic,
    Extent,
    Given,
    Planned,
    refuse,
)
from llmtune.evaluation.diagnosis.shown import (
    Facts,
    Paragraph,
    Section,
    Writer,
)

if TYPE_CHECKING:
    from llmtune.evaluation.diagnosis.subject import DiagnosisSettings, Subject

MAX_PROMPTS = 24
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class StopCount:
    """How many of `n` greedy answers ended by themselves."""

    stopped: int
    n: int
    mean_new_tokens: float

    @property
    def share(self) -> float:
        """Return the share of answers that stopped."""
        return self.stopped / self.n


@dataclass(frozen=True, kw_only=True)
class StopsResult(Diagnostic):
    """Whether generation still stops; `trained_stop_share` of the train rows hold a stop token."""

    FILE_NAME: ClassVar[str] = "stops.json"
    base: StopCount
    tuned: StopCount
    trained_stop_share: float
    max_new_tokens: int


class Stops(Diagnosis[StopsResult]):
    """Whether base and tuned model still end their answers."""

    name = "stops"
    what = "whether generation stops"
    help = "Whether answers still end"
    extent: ClassVar[Extent] = "quick"
    is_about_forgetting = True
    number_names = ("stop_rate",)
    result = StopsResult

    def plan(self, given: Given) -> Planned[StopsResult]:
        """Plan to count answers that end."""
        return plan_stops(given.subject, given.diagnosis_settings)

    def section(self, found: StopsResult, facts: Facts) -> Section | None:
        """Say how many answers ended."""
        write, tuned, base = facts.write, found.tuned, found.base
        return Section(
            "Do answers still end?",
            (
                Paragraph(
                    f"With at most {found.max_new_tokens} new tokens, "
                    f"{write.count(tuned.stopped)} of {write.count(tuned.n)} answers ended by "
                    f"themselves after tuning ({tuned.mean_new_tokens:.1f} tokens on average), "
                    f"{write.count(base.stopped)} of {write.count(base.n)} before "
                    f"({base.mean_new_tokens:.1f}). {write.share(found.trained_stop_share)} of the "
                    "training rows teach the model to stop."
                ),
            ),
        )

    def instead(self, facts: Facts) -> Section | None:
        """Say how many of the shown answers ended."""
        known, base, tuned = facts.example_stops
        if not known:
            return None
        text = (
            f"Generation ended by itself in {tuned} of {known} example answers after tuning, "
            f"{base} before."
        )
        return Section("", (Paragraph(text),))

    def summary_lines(self, found: StopsResult, write: Writer) -> list[str]:
        """Say how many answers ended."""
        return [
            f"Answers that end by themselves: {found.tuned.stopped} of {found.tuned.n} after "
            f"tuning, {found.base.stopped} of {found.base.n} before."
        ]

    def numbers(self, found: StopsResult) -> dict[str, float | None]:
        """Return the share of the tuned model's answers that ended."""
        return {"stop_rate": found.tuned.share}


def plan_stops(subject: Subject, settings: DiagnosisSettings) -> Planned[StopsResult]:
    """Plan to count the greedy answers that end by themselves within 64 tokens, base and tuned.

    On at most 24 prompts of the task. `trained_stop_share` is the share of train rows that train a
    token which ends an answer: where it is low, the tuned model was never taught to stop.
    """
    from llmtune.evaluation.diagnosis.subject import hash_ids, model_inputs, target_prompts

    scored = subject.scored
    prompts = target_prompts(subject, limit=MAX_PROMPTS, seed=settings.seed)
    if not prompts:
        return refuse(
            StopsResult,
            "the rows are documents and no target suite asks anything: where the continuation of a "
            "document should end is not known; a target suite with prompts is measured",
        )
    inputs = model_inputs(scored, with_adapter=True) | {
        "items": hash_ids(prompts),
        "stops": " ".join(map(str, scored.stop_token_ids)),
    }
    tokens = 2 * sum(len(prompt) + MAX_NEW_TOKENS for prompt in prompts)
    measure = partial(_measure, subject, settings, prompts, inputs)
    return Planned(StopsResult, inputs, tokens, measure)


def _measure(
    subject: Subject,
    settings: DiagnosisSettings,
    prompts: Sequence[Sequence[int]],
    inputs: Mapping[str, str],
) -> StopsResult:
    from llmtune.data.collect import stop_row_ratio
    from llmtune.scoring.batches import adapter_disabled
    from llmtune.scoring.generate import Decoding, generate_texts

    started = time.perf_counter()
    scored = subject.scored
    counts = {}
    for arm in ("base", "tuned"):
        block = adapter_disabled(scored.model) if arm == "base" else contextlib.nullcontext()
        with block:
            written = generate_texts(
                scored.model,
                scored.tokenizer,
                prompts,
                Decoding(MAX_NEW_TOKENS, scored.stop_token_ids),
                token_budget=settings.budget(scored),
                on_progress=settings.report(f"stops, {arm}", len(prompts)),
            )
        lengths = [len(generation.token_ids) for generation in written]
        counts[arm] = StopCount(
            stopped=sum(generation.stopped for generation in written),
            n=len(written),
            mean_new_tokens=sum(lengths) / len(lengths),
        )
    return StopsResult(
        inputs=inputs,
        seconds=time.perf_counter() - started,
        base=counts["base"],
        tuned=counts["tuned"],
        trained_stop_share=stop_row_ratio(subject.train, frozenset(scored.stop_token_ids)),
        max_new_tokens=MAX_NEW_TOKENS,
    )
