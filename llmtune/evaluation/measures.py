"""What an evaluation can measure: each entry of MEASURES plans what of it is still missing."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from llmtune.data.config import DataConfig
from llmtune.errors import LlmtuneError
from llmtune.evaluation.config import EvaluateConfig
from llmtune.evaluation.cost import TokenCounter
from llmtune.evaluation.diagnosis.prepare import TrainedSteps, prepare_subject
from llmtune.evaluation.diagnosis.subject import DiagnosisSettings, Subject
from llmtune.evaluation.few_shot import (
    draw_demonstrations,
    read_training_rows,
    takes_demonstrations,
)
from llmtune.evaluation.halves import in_half_size
from llmtune.evaluation.main_arms import OWN_TEMPLATE, SAME_AS
from llmtune.evaluation.predictions import read_predictions, score_predictions
from llmtune.evaluation.prompt_file import read_prompt_file
from llmtune.evaluation.results import ArmResult, save_arm_result
from llmtune.evaluation.run import (
    NOTHING,
    ArmPlan,
    Progress,
    build_recipe,
    read_finished,
    score_plan,
    scoring_settings,
    summarize_items,
)
from llmtune.evaluation.side_by_side import (
    ShownPrompt,
    answer_side_by_side,
    count_tokens,
    find_prompts,
)
from llmtune.evaluation.suite import choose_ids
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.fingerprint import hash_file
from llmtune.io.run_dir import RunDir, atomic_write_json
from llmtune.io.sizes import format_size
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.hardware import release_memory
from llmtune.models.live import LiveModel, ModelIdentity
from llmtune.models.quantization.config import DENSE, is_quantized
from llmtune.planning.devices import free_device
from llmtune.scoring.batches import model_device, position_limit
from llmtune.training.memory.measure import is_out_of_memory

log = logging.getLogger("llmtune")

NEEDS_ROWS = "needs the rows that were trained on; give them: data.train='[{path: FILE}]'"
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MIN_HALVED = 40
"""A general suite of fewer items is measured whole at every strength."""


@dataclass(frozen=True)
class Work:
    """One thing that is still to be measured: its forward tokens, at most, and how to do it."""

    tokens: int
    run: Callable[[], None]


@dataclass(frozen=True)
class EvaluationRequest:
    """What is evaluated: a run's models, rows and suites, and what is asked of them.

    `base` is the checkpoint that the user gave. `load` loads `tuned` (the base with the adapter on
    it), `original` (the base, never quantized) or `merged`; `mixed_data` is what was trained on,
    `data` the run's own rows. Both may hold no row: what needs rows is then left out.
    """

    knobs: EvaluateConfig
    run: RunDir
    base: Checkpoint
    suites: tuple[Suite, ...]
    data: DataConfig
    mixed_data: DataConfig
    trained: TrainedSteps
    load: Callable[[str], LiveModel]
    force: bool = False
    has_adapter: bool = True
    """Without one, `load("tuned")` loads the base alone."""
    why_no_strength: str | None = None
    """Why the adapter cannot be weakened; None if it can."""


class Evaluation:
    """One evaluation of a run: the one loaded base for all of it, and the results so far."""

    def __init__(self, request: EvaluationRequest) -> None:
        self.request = request
        self.knobs = request.knobs
        self.run = request.run
        self.suites = request.suites
        self.force = request.force
        self.settings = scoring_settings(request.knobs.token_budget)
        self.results: dict[str, dict[str, ArmResult]] = {suite.name: {} for suite in self.suites}
        self.left_out: dict[str, str] = {}
        self._scored: LiveModel | None = None
        self._subject: Subject | None = None
        self._device = "cpu"

    @property
    def data(self) -> DataConfig:
        """The run's own rows."""
        return self.request.data

    @property
    def strengths(self) -> tuple[float, ...]:
        """Other strengths of the adapter that are measured."""
        can_weaken = self.request.has_adapter and self.request.why_no_strength is None
        return self.knobs.measured_strengths if can_weaken else ()

    @property
    def has_rows(self) -> bool:
        """Whether the rows that were trained on are known."""
        return bool(self.data.train)

    @property
    def scored(self) -> LiveModel:
        """The base with the adapter on it, loaded once."""
        if self._scored is None:
            self._scored = self.request.load("tuned")
        return self._scored

    @property
    def subject(self) -> Subject:
        """The loaded model with its rows, prepared once."""
        if self._subject is None:
            request = self.request
            self._subject = prepare_subject(
                self.scored, self.suites, request.data, request.mixed_data, request.trained
            )
        return self._subject

    @cached_property
    def diagnosis_settings(self) -> DiagnosisSettings:
        """How diagnoses are made, with progress to the same log as the arms."""
        knobs, report = self.knobs, self.settings.on_progress

        def advance(what: str, done: int, total: int) -> None:
            if report is not None:
                report(Progress(what, "diagnosis", done, total))

        return DiagnosisSettings(self.settings.token_budget, knobs.seed, knobs.confidence, advance)

    @cached_property
    def counter(self) -> TokenCounter:
        """Counts what arms cost."""
        return TokenCounter(self.scored.tokenizer)

    def leave_out(self, measure: str, reason: str) -> None:
        """Say, and keep for the result, why something that was asked for is not measured."""
        log.info("evaluate: %s left out: %s", measure, reason)
        self.left_out[measure] = reason

    def load_alone(self, arm: str, checkpoint: Checkpoint, dtype: str) -> LiveModel | None:
        """Give the memory of what is loaded back and load a whole model in its place.

        None, and said, if it does not fit.
        """
        if self._scored is not None:
            self._device = str(model_device(self._scored.model))
        self._scored = self._subject = None
        release_memory()
        needed = 0
        if checkpoint.has_safetensors:
            size = ELEMENT_BYTES.get(dtype, 2)
            shapes = [entry.shape for entry in checkpoint.index.tensors.values()]
            needed = size * sum(map(math.prod, shapes))
        free = free_device(self._device).memory_bytes
        reason = (
            f"its weights need {format_size(needed)}, and {format_size(free)} are free on "
            f"{self._device}"
        )
        if needed > free:
            self.leave_out(arm, reason)
            return None
        try:
            return self.request.load(arm)
        except LlmtuneError as error:
            if error.__cause__ is None or not is_out_of_memory(error.__cause__):
                raise
        self.leave_out(arm, reason)
        return None

    def score(self, plan: ArmPlan) -> None:
        """Score an arm of the loaded base and adapter."""
        self.keep(score_plan(self.scored, plan))

    def keep(self, result: ArmResult) -> None:
        """Write a result down."""
        save_arm_result(result, self.run.evaluations_dir)
        self.results[result.suite][result.arm] = result

    def missing(self, plans: Iterable[ArmPlan], scored: LiveModel | None = None) -> list[ArmPlan]:
        """Return the plans without a finished result of the same recipe and model; take the others.

        Args:
            scored: whose results they would be; the loaded base and adapter by default.
        """
        left = []
        for plan in plans:
            found = None
            if not self.force:
                asked = scored or self.scored
                found = read_finished(self.run.evaluations_dir, asked, plan)
            if found is None:
                left.append(plan)
            else:
                self.results[plan.suite.name][plan.arm] = found
        return left

    def work_on(self, plans: Iterable[ArmPlan]) -> list[Work]:
        """Return what is missing of arms of the loaded base and adapter."""
        return [
            Work(
                self.counter.count(plan, shared_tokens=plan.about.get("demonstration_tokens", 0)),
                partial(self.score, plan),
            )
            for plan in self.missing(plans)
        ]


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
        atomic_write_json(path, answers)

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
    left = evaluation.missing(ArmPlan("original", s, evaluation.settings) for s in suites)
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
                evaluation.keep(score_plan(scored, plan))

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
    "strengths": plan_strengths,
}
LAST_MEASURES: dict[str, Plan] = {"original": plan_original, "merged": plan_merged}
"""Measures that take the base's place in memory, so nothing may come after them."""
