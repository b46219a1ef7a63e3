"""Scoring a suite's items with a live model: one function per task."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from llmtune.errors import LlmtuneError
from llmtune.evaluation.items import SuiteItem
from llmtune.evaluation.metrics import (
    CHOICE_FUNCTIONS,
    EXACT_FUNCTIONS,
    normalize_text,
)
from llmtune.evaluation.requests import Demonstration, build_choice_requests, encode_prompts
from llmtune.evaluation.results import ItemScore
from llmtune.evaluation.scored_model import ScoredModel
from llmtune.evaluation.suite import Suite
from llmtune.evaluation.suite_config import ChoiceSuite, ExactSuite, PerplexitySuite
from llmtune.scoring.generate import Decoding, Generation, generate_texts
from llmtune.scoring.likelihood import ContinuationScore, score_continuations
from llmtune.scoring.perplexity import TextScore, score_texts

OnItems = Callable[[int], None]


def score_items(
    scored: ScoredModel,
    suite: Suite,
    demonstrations: Sequence[Demonstration],
    token_budget: int,
    on_items: OnItems | None,
) -> list[ItemScore]:
    """Score every item of a suite, in the suite's order."""
    config, model, tokenizer = suite.config, scored.model, scored.tokenizer
    if isinstance(config, PerplexitySuite):
        texts = score_texts(
            model,
            tokenizer,
            [item.text for item in suite.items],
            max_length=config.max_length,
            token_budget=token_budget,
            on_progress=on_items,
        )
        passages = zip(suite.items, texts, strict=True)
        return [_perplexity_score(suite, item, score) for item, score in passages]
    if isinstance(config, ExactSuite):
        prompts = encode_prompts(tokenizer, suite, demonstrations)
        decoding = Decoding(config.max_new_tokens, scored.stops)
        written = generate_texts(
            model, tokenizer, prompts, decoding, token_budget=token_budget, on_progress=on_items
        )
        answers = zip(suite.items, written, strict=True)
        return [_exact_score(config, item, generation) for item, generation in answers]
    requests = build_choice_requests(tokenizer, suite, demonstrations)
    scores = score_continuations(model, requests, token_budget=token_budget, on_progress=on_items)
    choices = zip(suite.items, scores, strict=True)
    return [_choice_score(config, item, item_scores) for item, item_scores in choices]


def majority_accuracy(suite: Suite) -> float | None:
    """Return what always giving the commonest answer would score; None where that means nothing."""
    if isinstance(suite.config, PerplexitySuite):
        return None
    if isinstance(suite.config, ExactSuite):
        steps = suite.config.normalize
        answers = [normalize_text(item.references[0], steps) for item in suite.items]
    elif suite.config.choices is None:
        return None
    else:
        answers = [item.choices[item.answer] for item in suite.items]
    return Counter(answers).most_common(1)[0][1] / len(answers)


def chance_accuracy(suite: Suite) -> float | None:
    """Return what guessing among the choices would score; None where there are none."""
    if suite.task != "choice":
        return None
    return sum(1 / len(item.choices) for item in suite.items) / len(suite.items)


def _choice_score(
    config: ChoiceSuite, item: SuiteItem, scores: Sequence[ContinuationScore]
) -> ItemScore:
    values = [score.log_likelihood for score in scores]
    if config.normalize == "length":
        values = [score.log_likelihood / score.num_tokens for score in scores]
    return _item_score(
        item,
        score=CHOICE_FUNCTIONS[config.metric](values, item.answer),
        prediction=item.choices[values.index(max(values))],
        answer=item.choices[item.answer],
        details={
            "log_likelihoods": [score.log_likelihood for score in scores],
            "num_tokens": [score.num_tokens for score in scores],
            "answer_is_greedy": scores[item.answer].is_greedy,
        },
    )


def score_written(
    config: ExactSuite, item: SuiteItem, text: str, details: dict | None = None
) -> ItemScore:
    """Score an answer that was written out by the suite's metric."""
    found: str | None = text
    if config.extract is not None:
        match = re.search(config.extract, text)
        found = match.group(1) if match else None
    score = 0.0
    if found is not None:
        prediction = normalize_text(found, config.normalize)
        references = [normalize_text(text, config.normalize) for text in item.references]
        score = max(EXACT_FUNCTIONS[config.metric](prediction, text) for text in references)
    return _item_score(
        item,
        score=score,
        prediction=text,
        answer=item.references[0],
        parsed=bool(found and found.strip()),
        details=details or {},
    )


def _exact_score(config: ExactSuite, item: SuiteItem, generation: Generation) -> ItemScore:
    details = {"stopped": generation.stopped, "num_tokens": len(generation.token_ids)}
    return score_written(config, item, generation.text, details)


def _perplexity_score(suite: Suite, item: SuiteItem, score: TextScore) -> ItemScore:
    if score.num_tokens == 0:
        raise LlmtuneError(
            f"{suite.items_path}:{item.line}: the passage is one token, nothing can be predicted"
        )
    per_token = suite.config.metric == "nats_per_token"
    weight = score.num_tokens if per_token else score.num_bytes
    unit = 1.0 if per_token else math.log(2)
    return _item_score(
        item,
        score=score.negative_log_likelihood / unit / weight,
        prediction=None,
        answer=None,
        weight=float(weight),
        details={
            "negative_log_likelihood": score.negative_log_likelihood,
            "num_tokens": score.num_tokens,
            "num_bytes": score.num_bytes,
        },
    )


def _item_score(item: SuiteItem, **values: Any) -> ItemScore:
    return ItemScore(id=item.id, cluster=item.cluster, slices=dict(item.slices), **values)
