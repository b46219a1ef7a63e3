"""One evaluation of a run: what is asked for, the one loaded base, and the results so far."""

import logging
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

from llmtune.data.config import DataConfig
from llmtune.errors import LlmtuneError
from llmtune.evaluation.config import EvaluateConfig
from llmtune.evaluation.cost import TokenCounter
from llmtune.evaluation.diagnosis.subject import (
    DiagnosisSettings,
    Subject,
    TrainedSteps,
    prepare_subject,
)
from llmtune.evaluation.kept import find_kept, keep_scores
from llmtune.evaluation.results import REUSED, ArmResult, save_arm_result
from llmtune.evaluation.run import (
    ArmPlan,
    Progress,
    read_finished,
    score_plan,
    scoring_settings,
)
from llmtune.evaluation.sharing import ItemSharing
from llmtune.evaluation.tasks.base import Suite
from llmtune.io.processes import joined_processes
from llmtune.io.run_dir import RunDir
from llmtune.io.sizes import format_size
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.hardware import release_memory
from llmtune.models.live import LiveModel
from llmtune.models.probing import is_out_of_memory
from llmtune.models.quantization.describe import find_dense_weights
from llmtune.planning.devices import free_device
from llmtune.scoring.batches import model_device

log = logging.getLogger("llmtune")

TUNED = "tuned"
"""The model that answers as most arms."""
NEEDS_ROWS = "needs the rows that were trained on; give them: data.train='[{path: FILE}]'"
DENSE_SHARE = 0.5
"""Of the free memory, what the dequantized weights of a quantized base may take."""
LAYER_NAME = re.compile(r"\.\d+\.")
"""In the name of a layer's weight: which layer it is."""
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    keeps_base: bool = False
    """Whether scores of the base alone are taken over from earlier runs, and kept for later."""
    sharing: ItemSharing | None = None
    """Other processes that take a share of the items of every arm; None is this one alone."""
    num_parts: int = 1
    """Of every layer of what is loaded; other processes have the other parts."""


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
            self._scored = self.request.load(TUNED)
            dequantize_once(self._scored)
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
            needed = size * count_part(checkpoint, self.request.num_parts)
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

    def score(self, plan: ArmPlan, alone: LiveModel | None = None) -> None:
        """Score an arm of the loaded base and adapter, or of a model that was loaded alone."""
        scored = alone or self.scored
        sharing = self.request.sharing
        if sharing is None:
            result = score_plan(scored, plan)
        else:
            model = TUNED if alone is None else alone.arms[0]
            result = sharing.score_plan(scored, plan, model)
        self.keep(result)
        if self.request.keeps_base:
            keep_scores(scored, plan, result)

    def keep(self, result: ArmResult) -> None:
        """Write a result down."""
        save_arm_result(result, self.run.evaluations_dir)
        self.results[result.suite][result.arm] = result

    def missing(self, plans: Iterable[ArmPlan], scored: LiveModel | None = None) -> list[ArmPlan]:
        """Return the plans without a finished result of the same recipe and model; take the others.

        Those of the base alone may also be finished by an earlier run.

        Args:
            scored: whose results they would be; the loaded base and adapter by default.
        """
        left = []
        for plan in plans:
            found = None
            if not self.force:
                asked = scored or self.scored
                found = read_finished(self.run.evaluations_dir, asked, plan)
                if found is None and self.request.keeps_base:
                    found = find_kept(asked, plan)
                    if found is not None:
                        save_arm_result(found, self.run.evaluations_dir)
            if found is None:
                left.append(plan)
            else:
                self.results[plan.suite.name][plan.arm] = found
        return left

    def reused(self) -> dict[str, list[str]]:
        """Return the suites whose scores an earlier run measured, by arm."""
        found: dict[str, list[str]] = {}
        for suite, arms in self.results.items():
            for arm, result in arms.items():
                if REUSED in result.about:
                    found.setdefault(arm, []).append(suite)
        return found

    def work_on(self, plans: Iterable[ArmPlan]) -> list[Work]:
        """Return what is missing of arms of the loaded base and adapter."""
        return [
            Work(
                self.counter.count(plan, shared_tokens=plan.about.get("demonstration_tokens", 0)),
                partial(self.score, plan),
            )
            for plan in self.missing(plans)
        ]


def count_part(checkpoint: Checkpoint, num_parts: int) -> int:
    """Return the weights that a process has of a checkpoint: all that are outside of its layers."""
    whole = in_layers = 0
    for name, entry in checkpoint.index.tensors.items():
        if LAYER_NAME.search(name):
            in_layers += math.prod(entry.shape)
        else:
            whole += math.prod(entry.shape)
    return whole + in_layers // num_parts


def dequantize_once(live: LiveModel) -> None:
    """Keep the quantized weights dequantized for this evaluation if the free memory allows it."""
    dense = find_dense_weights(live.model)
    if not dense.bytes:
        return
    free = free_device(str(live.device)).memory_bytes
    if live.device.type == "cpu":  # the others of this run on this computer do the same
        free //= joined_processes().num_here
    is_held = dense.bytes <= DENSE_SHARE * free
    log.info(
        "evaluate: the quantized weights are dequantized %s: once takes %s, and %s are free",
        "once" if is_held else "in every pass",
        format_size(dense.bytes),
        format_size(free),
    )
    if is_held:
        dense.hold()
