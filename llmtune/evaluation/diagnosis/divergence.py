"""KL from base to tuned on general text and on the task's prompts, at every strength asked for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar, cast

from llmtune.evaluation.diagnosis.base import (
    Diagnosis,
    Diagnostic,
    Extent,
    Given,
    Interval,
    Planned,
)
from llmtune.evaluation.diagnosis.shown import (
    Cell,
    Facts,
    Paragraph,
    Section,
    Table,
    Writer,
)
from llmtune.io.fingerprint import hash_json

if TYPE_CHECKING:
    from peft import PeftModel

    from llmtune.evaluation.diagnosis.subject import DiagnosisSettings, Subject
    from llmtune.scoring.divergence import Divergence, Variant

GENERAL_TEXTS = 32
GENERAL_TOKENS = 128
TARGET_PROMPTS = 32
FULL_STRENGTH = "1.0"

NO_OTHER_STRENGTHS: Mapping[float, Variant] = {}

TEXTS = (("general", "general text"), ("target", "the task's prompts"))


@dataclass(frozen=True)
class TextDivergence:
    """KL(base || tuned) in nats a token, and the positions' share with a different likeliest token.

    `kl_interval` resamples the texts; None for one text.
    """

    kl: float
    top1_flips: float
    num_tokens: int
    num_texts: int
    kl_interval: Interval | None = None


@dataclass(frozen=True)
class StrengthDivergence:
    """At one strength: on general text and on the task's prompts; None if there is no text."""

    general: TextDivergence | None
    target: TextDivergence | None


@dataclass(frozen=True, kw_only=True)
class DivergenceResult(Diagnostic):
    """How far the tuned model's next-token distributions moved; `by_strength` holds "1.0" too."""

    FILE_NAME: ClassVar[str] = "divergence.json"
    general: TextDivergence | None
    target: TextDivergence | None
    by_strength: dict[str, StrengthDivergence] = field(default_factory=dict)


class DivergenceFromBase(Diagnosis[DivergenceResult]):
    """KL and changed first choices on general text and on the task's prompts."""

    name = "divergence"
    what = "divergence from the base"
    help = "KL and changed first choices against the base"
    extent: ClassVar[Extent] = "quick"
    needs_rows: ClassVar[bool] = False
    is_about_forgetting = True
    number_names = ("kl_general", "kl_target", "flips_general", "flips_target")
    result = DivergenceResult

    def plan(self, given: Given) -> Planned[DivergenceResult]:
        """Plan to measure it at every strength."""
        from llmtune.adapters.live import adapter_strength

        model = cast("PeftModel", given.scored.model)
        return plan_divergence(
            given.subject,
            given.diagnosis_settings,
            strengths={each: partial(adapter_strength, model, each) for each in given.strengths},
        )

    def section(self, found: DivergenceResult, facts: Facts) -> Section | None:
        """Show KL and changed tokens, on both texts and at every strength."""
        rows = tuple(
            (
                text,
                strength,
                _kl_cell(at),
                facts.write.share(at.top1_flips),
                facts.write.count(at.num_tokens),
            )
            for text, strength, at in _by_text(found)
        )
        if not rows:
            return None
        head = ("On", "Strength", "KL, nats/token", "Likeliest token changed", "Tokens")
        note = (
            "KL of the tuned model's next-token distribution from the base's, over the whole "
            "vocabulary; 0 is no change."
        )
        return Section(
            "How far the predictions moved", (Table(rows, head), Paragraph(note, is_note=True))
        )

    def summary_lines(self, found: DivergenceResult, write: Writer) -> list[str]:
        """Say how far the full adapter moved on both texts."""
        return [
            f"KL from the base on {text}: {write.number(at.kl)} nats/token; the likeliest token "
            f"changed at {100 * at.top1_flips:.1f} % of positions."
            for key, text in TEXTS
            if (at := getattr(found, key)) is not None
        ]

    def numbers(self, found: DivergenceResult) -> dict[str, float | None]:
        """Return KL and flips on both texts."""
        return {
            f"{name}_{key}": getattr(getattr(found, key), number, None)
            for name, number in (("kl", "kl"), ("flips", "top1_flips"))
            for key, _ in TEXTS
        }


def _by_text(found: DivergenceResult) -> list[tuple[str, str, TextDivergence]]:
    """Return (text, strength, divergence) for every strength that was measured, 1 last."""
    rows = []
    smaller = sorted((s for s in found.by_strength if float(s) != 1), key=float)
    for key, text in TEXTS:
        for strength in smaller:
            at = getattr(found.by_strength[strength], key)
            if at is not None:
                rows.append((text, strength, at))
        whole = getattr(found, key)
        if whole is not None:
            rows.append((text, "1", whole))
    return rows


def _kl_cell(at: TextDivergence) -> str | Cell:
    if at.kl_interval is None:
        return f"{at.kl:.4f}"
    low, high = at.kl_interval
    return Cell(f"{at.kl:.4f}", f"[{low:.4f}, {high:.4f}]")


def plan_divergence(
    subject: Subject,
    settings: DiagnosisSettings,
    *,
    strengths: Mapping[float, Variant] = NO_OTHER_STRENGTHS,
) -> Planned[DivergenceResult]:
    """Plan to measure KL = (1/N) sum_t sum_v p0(v) log(p0(v) / p1(v)) of base and tuned, in nats.

    On the first 128 tokens of at most 32 general passages and on at most 32 prompts of the task,
    every position and the whole vocabulary; with it the share of positions whose likeliest token
    changed. KL on the task's prompts predicts forgetting (RL's Razor, arXiv:2509.04259). The
    interval resamples texts.

    Args:
        strengths: for every other strength what to enter so that the adapter has it.
    """
    from llmtune.evaluation.diagnosis.subject import (
        general_sequences,
        hash_ids,
        model_inputs,
        target_prompts,
    )

    texts: dict[str, Sequence[Sequence[int]]] = {
        "general": general_sequences(
            subject, limit=GENERAL_TEXTS, max_tokens=GENERAL_TOKENS, seed=settings.seed
        ),
        "target": target_prompts(
            subject, limit=TARGET_PROMPTS, seed=settings.seed, with_documents=True
        ),
    }
    variants: dict[str, Variant] = {FULL_STRENGTH: contextlib.nullcontext}
    variants |= {str(float(strength)): enter for strength, enter in strengths.items()}
    inputs = model_inputs(subject.scored, with_adapter=True) | {
        "items": hash_json({name: hash_ids(ids) for name, ids in texts.items()}),
        "strengths": " ".join(sorted(variants)),
    }
    tokens = sum(len(row) for rows in texts.values() for row in rows) * (1 + len(variants))

    def measure() -> DivergenceResult:
        started = time.perf_counter()
        found = {name: _measure(subject, settings, name, texts[name], variants) for name in texts}
        general, target = found["general"], found["target"]
        return DivergenceResult(
            inputs=inputs,
            seconds=time.perf_counter() - started,
            general=general.get(FULL_STRENGTH),
            target=target.get(FULL_STRENGTH),
            by_strength={
                strength: StrengthDivergence(general.get(strength), target.get(strength))
                for strength in variants
            },
        )

    return Planned(DivergenceResult, inputs, tokens, measure)


def _measure(
    subject: Subject,
    settings: DiagnosisSettings,
    name: str,
    sequences: Sequence[Sequence[int]],
    variants: Mapping[str, Variant],
) -> dict[str, TextDivergence]:
    from llmtune.scoring.divergence import measure_divergence

    if not sequences:
        return {}
    measured = measure_divergence(
        subject.scored.model,
        sequences,
        token_budget=settings.budget(subject.scored),
        variants=variants,
        on_progress=settings.report(f"divergence on {name} text", len(sequences)),
    )
    return {strength: _summarize(found, settings) for strength, found in measured.items()}


def _summarize(found: Divergence, settings: DiagnosisSettings) -> TextDivergence:
    import numpy as np

    from llmtune.evaluation.stats import paired_bootstrap

    weights = found.num_tokens.astype(np.float64)
    interval = None
    if len(weights) > 1:
        resampled = paired_bootstrap(
            found.kl_sums / weights,
            weights=weights,
            confidence=settings.confidence,
            seed=settings.seed,
        )
        interval = (resampled.low, resampled.high)
    return TextDivergence(
        kl=found.kl,
        top1_flips=found.top1_flips,
        num_tokens=int(weights.sum()),
        num_texts=len(weights),
        kl_interval=interval,
    )
