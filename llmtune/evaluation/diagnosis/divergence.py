"""KL from base to tuned on general text and on the task's prompts, at every strength asked for."""

import contextlib
import time
from collections.abc import Mapping, Sequence

import numpy as np

from llmtune.evaluation.diagnosis.plan import Diagnosis
from llmtune.evaluation.diagnosis.results import (
    DivergenceResult,
    StrengthDivergence,
    TextDivergence,
)
from llmtune.evaluation.diagnosis.subject import (
    DiagnosisSettings,
    Subject,
    general_sequences,
    hash_ids,
    model_inputs,
    target_prompts,
)
from llmtune.evaluation.stats import paired_bootstrap
from llmtune.io.fingerprint import hash_json
from llmtune.scoring.divergence import Divergence, Variant, measure_divergence

GENERAL_TEXTS = 32
GENERAL_TOKENS = 128
TARGET_PROMPTS = 32
FULL_STRENGTH = "1.0"

NO_OTHER_STRENGTHS: Mapping[float, Variant] = {}


def plan_divergence(
    subject: Subject,
    settings: DiagnosisSettings,
    *,
    strengths: Mapping[float, Variant] = NO_OTHER_STRENGTHS,
) -> Diagnosis[DivergenceResult]:
    """Plan to measure KL = (1/N) sum_t sum_v p0(v) log(p0(v) / p1(v)) of base and tuned, in nats.

    On the first 128 tokens of at most 32 general passages and on at most 32 prompts of the task,
    every position and the whole vocabulary; with it the share of positions whose likeliest token
    changed. KL on the task's prompts predicts forgetting (RL's Razor, arXiv:2509.04259). The
    interval resamples texts.

    Args:
        strengths: for every other strength what to enter so that the adapter has it.
    """
    texts: dict[str, Sequence[Sequence[int]]] = {
        "general": general_sequences(
            subject, limit=GENERAL_TEXTS, max_tokens=GENERAL_TOKENS, seed=settings.seed
        ),
        "target": target_prompts(subject, limit=TARGET_PROMPTS, seed=settings.seed),
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

    return Diagnosis(DivergenceResult, inputs, tokens, measure)


def _measure(
    subject: Subject,
    settings: DiagnosisSettings,
    name: str,
    sequences: Sequence[Sequence[int]],
    variants: Mapping[str, Variant],
) -> dict[str, TextDivergence]:
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
