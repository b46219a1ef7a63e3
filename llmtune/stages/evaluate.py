"""The evaluate stage: base and tuned on one loaded model, then the merged model, same items."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from llmtune.answering.live import LiveTarget, load_live
from llmtune.answering.score import scoring_settings
from llmtune.config import RunConfig
from llmtune.data.example import IGNORE_INDEX
from llmtune.data.prepare import prepare_examples
from llmtune.data.render import render_messages
from llmtune.evaluation.requests import encode_prompts
from llmtune.evaluation.results import ArmResult
from llmtune.evaluation.run import evaluate_arms
from llmtune.evaluation.suite import Suite
from llmtune.open_prompts import OPEN_PROMPTS
from llmtune.run_dir import atomic_write_json
from llmtune.scoring.batches import choose_token_budget
from llmtune.scoring.generate import Decoding, generate_texts
from llmtune.targets import Target

SHOWN_ROWS = 4
SHOWN_OPEN_PROMPTS = 4
SHOWN_NEW_TOKENS = 48


def run_evaluate_stage(
    config: RunConfig, suites: Sequence[Suite], *, force: bool = False
) -> dict[str, Any]:
    """Score the run's arms on its suites and write both models' answers to a few prompts.

    Results are kept one file a suite and arm; those of the same recipe and model are read instead
    of scored again, unless `force`. The merged model is scored on the target suites.
    """
    run = config.run
    target = Target(str(run.path), config.model, run.adapter_dir, run.merged_dir, config)
    live = load_live(target, "tuned")
    settings = scoring_settings(config.evaluate)
    arms = [arm for arm in ("base", "tuned") if arm in config.evaluate.arms]
    scores = evaluate_arms(
        live.scored,
        suites,
        arms=arms,
        results_dir=run.evaluations_dir,
        reuse=not force,
        settings=settings,
    )
    atomic_write_json(run.generations_path, _side_by_side(live, config, suites))
    if "merged" in config.evaluate.arms:
        del live
        gc.collect()
        targets = [suite for suite in suites if suite.role == "target"]
        merged = load_live(target, "merged")
        merged_scores = evaluate_arms(
            merged.scored,
            targets,
            arms=("merged",),
            results_dir=run.evaluations_dir,
            reuse=not force,
            settings=settings,
        )
        for name, by_arm in merged_scores.items():
            scores[name] |= by_arm
    return {name: _means(by_arm) for name, by_arm in scores.items()}


def _means(by_arm: dict[str, ArmResult]) -> dict[str, float]:
    return {arm: result.mean for arm, result in by_arm.items()}


@dataclass(frozen=True)
class _Shown:
    """One prompt for the side-by-side answers: as text, as ids, and the right answer if known."""

    text: str
    ids: Sequence[int]
    reference: str | None = None


def _side_by_side(
    live: LiveTarget, config: RunConfig, suites: Sequence[Suite]
) -> list[dict[str, Any]]:
    """Return held-out prompts and open questions, answered by base and by tuned model."""
    tokenizer = live.loaded.tokenizer
    prompts = _suite_prompts(suites, tokenizer) or _row_prompts(config, tokenizer)
    if tokenizer.chat_template:
        for question in OPEN_PROMPTS[:SHOWN_OPEN_PROMPTS]:
            messages = [{"role": "user", "content": question}]
            ids = render_messages(tokenizer, messages, add_generation_prompt=True)
            prompts.append(_Shown(question, ids))
    decoding = Decoding(SHOWN_NEW_TOKENS, live.loaded.stop_token_ids)
    answers = {}
    for arm in ("base", "tuned"):
        with live.answering_as(arm) as model:
            answers[arm] = generate_texts(
                model,
                tokenizer,
                [shown.ids for shown in prompts],
                decoding,
                token_budget=choose_token_budget(model),
            )
    return [
        {
            "prompt": shown.text,
            "base": base.text,
            "tuned": tuned.text,
            "base_stopped": base.stopped,
            "tuned_stopped": tuned.stopped,
            "reference": shown.reference,
        }
        for shown, base, tuned in zip(prompts, answers["base"], answers["tuned"], strict=True)
    ]


def _suite_prompts(suites: Sequence[Suite], tokenizer: PreTrainedTokenizerFast) -> list[_Shown]:
    """Return the first items of the first target suite that asks something."""
    asking = [s for s in suites if s.role == "target" and s.task in {"choice", "exact"}]
    if not asking:
        return []
    suite = asking[0]
    shown = []
    for item, ids in zip(suite.items, encode_prompts(tokenizer, suite), strict=True):
        is_choice = isinstance(item.answer, int)
        reference = item.choices[item.answer] if is_choice else str(item.answer)
        shown.append(_Shown(item.prompt, ids, reference))
    return shown[:SHOWN_ROWS]


def _row_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> list[_Shown]:
    """Return the first rows of the evaluation split, as the model reads them."""
    held_out = prepare_examples(config.data, tokenizer, split="evaluation", seed=config.seed)
    shown = []
    for index in range(min(SHOWN_ROWS, len(held_out.examples))):
        example = held_out.examples[index]
        first = next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
        answer = [label for label in example.labels if label != IGNORE_INDEX]
        shown.append(
            _Shown(
                tokenizer.decode(example.input_ids[:first]),
                list(example.input_ids[:first]),
                tokenizer.decode(answer, skip_special_tokens=True),
            )
        )
    return shown
