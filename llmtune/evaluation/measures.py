"""What an evaluation can measure: each entry of MEASURES plans what of it is still missing."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from llmtune.evaluation.endpoints import plan_endpoints
from llmtune.evaluation.few_shot import (
    draw_demonstrations,
    read_training_rows,
    takes_demonstrations,
)
from llmtune.evaluation.halves import choose_ids, in_half_size
from llmtune.evaluation.main_arms import OWN_TEMPLATE, SAME_AS
from llmtune.evaluation.predictions import read_predictions, score_predictions
from llmtune.evaluation.prompt_file import read_prompt_file
from llmtune.evaluation.run import (
    NOTHING,
    ArmPlan,
    build_recipe,
    summarize_items,
)
from llmtune.evaluation.session import NEEDS_ROWS, Evaluation, Work
from llmtune.evaluation.side_by_side import (
    ShownPrompt,
    answer_side_by_side,
    count_tokens,
    find_prompts,
)
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.fingerprint import hash_file
from llmtune.io.run_dir import atomic_write_json
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.live import ModelIdentity
from llmtune.models.quantization.config import DENSE, is_quantized
from llmtune.scoring.batches import position_limit

log = logging.getLogger("llmtune")

MIN_HALVED = 40
"""A general suite of fewer items is measured whole at every strength."""


def plan_zero_shot(evaluation: Evaluation) -> list[Work]:
    """Base and tuned model on every suite."""
    arms = [arm for arm in ("base", "tuned") if arm in evaluation.knobs.arms]
    return evaluation.work_on(
        ArmPlan(arm, suite, evaluation.settings) for arm in arms for suite in evaluation.suites
    )


def plan_side_by_side(evaluation: Evaluation) -> list[Work]:
    """A few prompts answered by both, where an answer of either may have changed."""
    path = evaluation.run.generations_path
    arms = ("base", "tuned")
    if not evaluation.request.has_adapter:
        return []
    known = [by_arm for by_arm in evaluation.results.values() if all(arm in by_arm for arm in arms)]
    if path.is_file() and not evaluation.force and len(known) == len(evaluation.suites) > 0:
        return []

    def shown_prompts() -> list[ShownPrompt]:
        tokenizer, seed = evaluation.scored.tokenizer, evaluation.request.trained.seed
        return find_prompts(tokenizer, evaluation.suites, evaluation.data, seed)

    def answer() -> None:
        answers = answer_side_by_side(evaluation.scored, shown_prompts())
        atomic_write_json(path, [asdict(each) for each in answers])

    return [Work(count_tokens(shown_prompts()), answer)]


def plan_few_shot(evaluation: Evaluation) -> list[Work]:
    """The base with demonstrations, one arm a draw, on target and transfer suites."""
    knobs = evaluation.knobs.few_shot
    suites = [suite for suite in evaluation.suites if takes_demonstrations(suite)]
    if not evaluation.knobs.measures("few_shot") or not suites:
        return []
    if not evaluation.has_rows:
        evaluation.leave_out("few_shot", NEEDS_ROWS)
        return []
    rows = read_training_rows(evaluation.data, evaluation.suites, knobs.seed)
    scored = evaluation.scored
    plans = []
    for suite in suites:
        ids = choose_ids([item.id for item in suite.items], knobs.limit, evaluation.knobs.seed)
        for number in range(1, knobs.draws + 1):
            draw = draw_demonstrations(
                rows,
                suite,
                scored.tokenizer,
                shots=knobs.shots,
                seed=f"{knobs.seed}:{number}",
                max_tokens=position_limit(scored.model),
            )
            if draw is None:
                evaluation.leave_out(
                    f"few-shot on {suite.name}",
                    "no training row has one of its answers, or none fits the model's context",
                )
                break
            settings = replace(evaluation.settings, demonstrations=draw.demonstrations)
            about = {
                "shots": len(draw.demonstrations),
                "draw": number,
                "demonstration_tokens": draw.tokens,
                "wording": draw.wording,
            }
            plans.append(ArmPlan(f"few-shot-{number}", suite.select(ids), settings, about))
    return evaluation.work_on(plans)


def plan_prompts(evaluation: Evaluation) -> list[Work]:
    """The base with the user's own prompts, on target and transfer suites."""
    plans = []
    for name, path in evaluation.knobs.prompts.items():
        settings = replace(evaluation.settings, prompt=read_prompt_file(name, path))
        about = {"file": str(path)}
        plans += [
            ArmPlan(f"prompt-{name}", suite, settings, about)
            for suite in evaluation.suites
            if takes_demonstrations(suite)
        ]
    return evaluation.work_on(plans)


def plan_predictions(evaluation: Evaluation) -> list[Work]:
    """Another model's answers from files; they cost nothing, so they are always scored anew."""
    work = []
    for name, path in evaluation.knobs.predictions.items():
        predictions = read_predictions(name, path)
        suites = [suite for suite in evaluation.suites if suite.asks]
        answered = predictions.texts_by_suite(suites)
        predictions.say_unknown(answered)
        for suite, texts in answered:
            items = score_predictions(suite, texts)
            chosen = suite.select(set(texts))
            result = summarize_items(
                suite,
                f"other-{name}",
                items,
                recipe=build_recipe(evaluation.scored, chosen, evaluation.settings),
                model={"predictions": hash_file(path)},
                seconds=0.0,
                about={"file": str(path)},
            )
            work.append(Work(0, partial(evaluation.keep, result)))
    return work


def plan_strengths(evaluation: Evaluation) -> list[Work]:
    """The adapter weakened: target suites whole, general ones at half their size."""
    if evaluation.knobs.measured_strengths and evaluation.request.why_no_strength:
        evaluation.leave_out("strengths", evaluation.request.why_no_strength)
    return evaluation.work_on(
        ArmPlan(
            f"strength-{strength:g}",
            chosen,
            evaluation.settings,
            {"strength": strength},
            strength=strength,
        )
        for strength in evaluation.strengths
        for suite in evaluation.suites
        if (chosen := items_at_strength(suite)) is not None
    )


def plan_original(evaluation: Evaluation) -> list[Work]:
    """The base as the user gave it on every suite, loaded alone; without quantization, the base."""
    live, suites = evaluation.scored, evaluation.suites
    if "original" not in evaluation.knobs.arms:
        return []
    if is_quantized(live.identity.quantization):
        identity = replace(live.identity, adapter=None, quantization=DENSE.method)
        return _plan_alone(evaluation, "original", evaluation.request.base, identity)
    if "base" not in evaluation.knobs.arms:
        return evaluation.work_on(ArmPlan("original", s, evaluation.settings) for s in suites)
    same = {SAME_AS: "base"}  # also in what an earlier run measured
    left = evaluation.missing(ArmPlan("original", s, evaluation.settings, same) for s in suites)
    return [Work(0, partial(_take_from_base, evaluation, plan.suite)) for plan in left]


def _take_from_base(evaluation: Evaluation, suite: Suite) -> None:
    """Keep the base's result as the original's: they are one model, measured once."""
    base = evaluation.results[suite.name]["base"]
    about = {**base.about, SAME_AS: "base"}
    evaluation.keep(replace(base, arm="original", seconds=0.0, about=about))


def plan_merged(evaluation: Evaluation) -> list[Work]:
    """The merged model on every suite, loaded alone."""
    if "merged" not in evaluation.knobs.arms:
        return []
    merged = Checkpoint.open(evaluation.run.merged_dir)
    about = {} if evaluation.request.has_adapter else {OWN_TEMPLATE: True}
    identity = replace(
        evaluation.scored.identity,
        base=merged.fingerprint,
        adapter=None,
        quantization=DENSE.method,
    )
    return _plan_alone(evaluation, "merged", merged, identity, about)


def _plan_alone(
    evaluation: Evaluation,
    arm: str,
    checkpoint: Checkpoint,
    identity: ModelIdentity,
    about: Mapping[str, Any] = NOTHING,
) -> list[Work]:
    """Score a model that is loaded in the base's place; one that does not fit is left out."""
    plans = [ArmPlan(arm, suite, evaluation.settings, about) for suite in evaluation.suites]
    left = evaluation.missing(plans, replace(evaluation.scored, identity=identity))
    if not left:
        return []

    def score() -> None:
        scored = evaluation.load_alone(arm, checkpoint, identity.dtype)
        if scored is not None:
            for plan in left:
                evaluation.score(plan, scored)

    return [Work(sum(evaluation.counter.count(plan) for plan in left), score)]


def items_at_strength(suite: Suite) -> Suite | None:
    """Return the items that are measured at every strength; None for suites that are not.

    A strength is chosen by the target's gain and by what general ability it costs.
    """
    if suite.role == "transfer":
        return None
    if suite.role == "target" or len(suite.items) < MIN_HALVED:
        return suite
    return suite.select({item.id for item in suite.items if in_half_size(item.id)})


Plan = Callable[[Evaluation], list[Work]]

ARM_MEASURES: dict[str, Plan] = {
    "zero-shot": plan_zero_shot,
    "side by side": plan_side_by_side,
    "few-shot": plan_few_shot,
    "prompts": plan_prompts,
    "predictions": plan_predictions,
    "endpoints": plan_endpoints,
    "strengths": plan_strengths,
}
LAST_MEASURES: dict[str, Plan] = {"original": plan_original, "merged": plan_merged}
"""Measures that take the base's place in memory, so nothing may come after them."""
