"""The evaluate stage: base and tuned on one loaded model, then the merged model, same items."""

import gc
from collections.abc import Sequence
from typing import Any

from llmtune.answering.live import LiveTarget, load_live
from llmtune.answering.score import ProgressLog
from llmtune.config import RunConfig
from llmtune.data.example import IGNORE_INDEX, Example
from llmtune.data.prepare import prepare_examples
from llmtune.data.render import render_messages
from llmtune.evaluation.results import ArmResult
from llmtune.evaluation.run import ScoringSettings, evaluate_arms
from llmtune.evaluation.suite import Suite
from llmtune.open_prompts import OPEN_PROMPTS
from llmtune.run_dir import atomic_write_json
from llmtune.scoring.batches import choose_token_budget
from llmtune.scoring.generate import Decoding, generate_texts
from llmtune.targets import Target

SHOWN_ROWS = 4
SHOWN_OPEN_PROMPTS = 4
SHOWN_NEW_TOKENS = 48


def run_evaluate_stage(config: RunConfig, suites: Sequence[Suite]) -> dict[str, Any]:
    """Score the run's arms on its suites and write both models' answers to a few prompts.

    Results are kept one file a suite and arm; the merged model is scored on the target suites.
    """
    run = config.run
    target = Target(str(run.path), config.model, run.adapter_dir, run.merged_dir, config)
    live = load_live(target, "tuned")
    settings = scoring_settings(config)
    arms = [arm for arm in ("base", "tuned") if arm in config.evaluate.arms]
    scores = evaluate_arms(
        live.scored,
        suites,
        arms=arms,
        results_dir=run.evaluations_dir,
        settings=settings,
    )
    atomic_write_json(run.generations_path, _side_by_side(live, config))
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
            settings=settings,
        )
        for name, by_arm in merged_scores.items():
            scores[name] |= by_arm
    return {name: _means(by_arm) for name, by_arm in scores.items()}


def scoring_settings(config: RunConfig) -> ScoringSettings:
    """Return how this run's items are scored, with progress to the log."""
    budget = config.evaluate.token_budget
    return ScoringSettings(
        token_budget=None if budget == "auto" else budget, on_progress=ProgressLog()
    )


def _means(by_arm: dict[str, ArmResult]) -> dict[str, float]:
    return {arm: result.mean for arm, result in by_arm.items()}


def _side_by_side(live: LiveTarget, config: RunConfig) -> list[dict[str, Any]]:
    """Return held-out rows and open questions, answered by base and by tuned model."""
    tokenizer = live.loaded.tokenizer
    held_out = prepare_examples(config.data, tokenizer, split="evaluation", seed=config.seed)
    shown = [held_out.examples[i] for i in range(min(SHOWN_ROWS, len(held_out.examples)))]
    prompts = [_prompt_ids(example) for example in shown]
    references: list[str | None] = [
        tokenizer.decode(_answer_ids(example), skip_special_tokens=True) for example in shown
    ]
    if tokenizer.chat_template:
        for question in OPEN_PROMPTS[:SHOWN_OPEN_PROMPTS]:
            messages = [{"role": "user", "content": question}]
            prompts.append(render_messages(tokenizer, messages, add_generation_prompt=True))
            references.append(None)
    decoding = Decoding(SHOWN_NEW_TOKENS, live.loaded.stop_token_ids)
    answers = {}
    for arm in ("base", "tuned"):
        with live.answering_as(arm) as model:
            answers[arm] = generate_texts(
                model, tokenizer, prompts, decoding, token_budget=choose_token_budget(model)
            )
    return [
        {
            "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
            "base": base.text,
            "tuned": tuned.text,
            "base_stopped": base.stopped,
            "tuned_stopped": tuned.stopped,
            "reference": reference,
        }
        for prompt, reference, base, tuned in zip(
            prompts, references, answers["base"], answers["tuned"], strict=True
        )
    ]


def _prompt_ids(example: Example) -> list[int]:
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)
    return list(example.input_ids[:first])


def _answer_ids(example: Example) -> list[int]:
    return [label for label in example.labels if label != IGNORE_INDEX]
