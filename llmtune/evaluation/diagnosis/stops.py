"""Does generation still end by itself?"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from functools import partial

from llmtune.data.collect import stop_row_ratio
from llmtune.evaluation.diagnosis.plan import Diagnosis, refuse
from llmtune.evaluation.diagnosis.results import StopCount, StopsResult
from llmtune.evaluation.diagnosis.subject import (
    DiagnosisSettings,
    Subject,
    hash_ids,
    model_inputs,
    target_prompts,
)
from llmtune.scoring.batches import adapter_disabled
from llmtune.scoring.generate import Decoding, generate_texts

MAX_PROMPTS = 24
MAX_NEW_TOKENS = 64


def plan_stops(subject: Subject, settings: DiagnosisSettings) -> Diagnosis[StopsResult]:
    """Plan to count the greedy answers that end by themselves within 64 tokens, base and tuned.

    On at most 24 prompts of the task. `trained_stop_share` is the share of train rows that train a
    token which ends an answer: where it is low, the tuned model was never taught to stop.
    """
    scored = subject.scored
    prompts = target_prompts(subject, limit=MAX_PROMPTS, seed=settings.seed)
    if not prompts:
        return refuse(StopsResult, "neither a target suite nor a row has a prompt to answer")
    inputs = model_inputs(scored, with_adapter=True) | {
        "items": hash_ids(prompts),
        "stops": " ".join(map(str, scored.stops)),
    }
    tokens = 2 * sum(len(prompt) + MAX_NEW_TOKENS for prompt in prompts)
    measure = partial(_measure, subject, settings, prompts, inputs)
    return Diagnosis(StopsResult, inputs, tokens, measure)


def _measure(
    subject: Subject,
    settings: DiagnosisSettings,
    prompts: Sequence[Sequence[int]],
    inputs: Mapping[str, str],
) -> StopsResult:
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
                Decoding(MAX_NEW_TOKENS, scored.stops),
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
        trained_stop_share=stop_row_ratio(subject.train, frozenset(scored.stops)),
        max_new_tokens=MAX_NEW_TOKENS,
    )
