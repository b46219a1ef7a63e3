"""The knobs of the training stage."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject
from llmtune.schema import Section, default_of
from llmtune.training.objectives import DEFAULT_OBJECTIVE, ObjectiveConfig

Reporter = Literal["tensorboard", "wandb", "mlflow", "trackio"]
OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "lion", "lion_8bit", "adafactor"]
Schedule = Literal["cosine", "linear", "constant", "warmup_stable_decay", "cosine_with_restarts"]


class EarlyStopping(Section):
    """Stop when the evaluation loss no longer falls, and keep the best evaluation's weights."""

    metric: Literal["eval_loss"] = "eval_loss"
    """What must keep falling."""
    patience: PositiveInt = 3
    """Evaluations in a row without an improvement before the run stops."""
    min_delta: float = Field(0.0, ge=0)
    """Fall of the metric (nats a token) that counts as an improvement."""


RATE_EXPONENTS = MappingProxyType({"llama": 0.781, "qwen": 0.0775})
"""How the best learning rate of LoRA falls with the width of a family's models."""
NARROWEST = 2048
"""The narrowest model that the exponents were fitted on."""
SCHEDULE_KNOBS: Mapping[str, Schedule] = MappingProxyType(
    {"decay_ratio": "warmup_stable_decay", "num_cycles": "cosine_with_restarts"}
)
"""Knobs of one schedule alone."""
RESULT_KNOBS = frozenset(
    {
        "learning_rate",
        "max_steps",
        "num_epochs",
        "batch_size",
        "schedule",
        "warmup_ratio",
        "weight_decay",
        "max_grad_norm",
        "optimizer",
        "neftune_alpha",
    }
)
"""What changes the trained weights; the other knobs may differ when a run is continued."""
LATER_KNOBS = frozenset(
    {
        "objective",
        "learning_rates",
        "warmup_steps",
        "min_lr_ratio",
        "decay_ratio",
        "num_cycles",
    }
)
"""Such knobs too, and unset in runs that are older than they are: counted where they are set."""


class TrainConfig(Section):
    """How the adapter is trained.

    `max_steps` or `num_epochs` decides the length of the run; giving both is an error, giving
    neither is one pass over the data.
    """

    RIVALS: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"max_steps", "num_epochs"}),)

    objective: ObjectiveConfig = DEFAULT_OBJECTIVE
    """What training minimizes; sft: the cross-entropy of the trained tokens."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate."""
    max_steps: PositiveInt | None = None
    """Length of the run in optimizer steps."""
    num_epochs: Annotated[float, Field(gt=0)] | None = None
    """Length of the run in passes over the training rows; 1 if nothing is set."""
    batch_size: PositiveInt = 16
    """Rows in one optimizer step, however they are split to fit the memory."""
    micro_batch_size: Literal["auto"] | PositiveInt = "auto"
    """Rows in one forward and backward pass; auto fills a budget of tokens that fits the memory. It
    changes speed and memory, not the result."""
    learning_rates: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Peak learning rates of their own for parameters whose name holds the key, the longest key
    first: {lora_B: 3e-3} is LoRA+, {lm_head: 1e-5} spares a head that is trained whole."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after the warm-up: cosine, linear, constant,
    warmup_stable_decay (constant, then down on a line) or cosine_with_restarts."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps over which it rises, in place of `warmup_ratio`; null goes by the ratio."""
    min_lr_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the peak that the learning rate falls to, instead of 0."""
    decay_ratio: float = Field(0.2, gt=0, le=1)
    """Share of the steps after the warm-up that warmup_stable_decay falls over."""
    num_cycles: PositiveInt = 1
    """Cosines that cosine_with_restarts has, each from the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient norm above which gradients are scaled down; 0 is never."""
    optimizer: OptimizerName = "adamw"
    """adamw: fused, float32 state. adamw_8bit, lion_8bit: 8-bit state; paged_adamw_8bit: moved to
    the computer's memory when the GPU's is full; lion: one moment, wants about a tenth of AdamW's
    learning rate; adafactor: a row and a column in place of a second moment."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength of NEFTune's noise on the embeddings (5 is usual); null is none."""
    early_stopping: EarlyStopping | None = None
    """Stop when the evaluation loss stops falling; null runs to the end."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations; null evaluates once, at the end."""
    shard: Literal["none", "full"] = "none"
    """What several processes (torchrun) keep of the base: none cuts nothing, each has all of it;
    full cuts every layer over them (FSDP2), for a 16-bit or 32-bit base that is larger than a card.
    It changes memory and speed, not the result."""
    save_every: PositiveInt = 100
    """Steps between checkpoints; one more is saved at the end or when stopped."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep; the best one stays besides."""
    log_every: PositiveInt = 1
    """Steps between lines of metrics."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass to save memory; auto recomputes only if the
    measured need does not fit."""
    report_to: tuple[Reporter, ...] = ()
    """Trackers: tensorboard, wandb, mlflow, trackio. Nothing is sent unasked."""
    resume: Literal["auto", "never"] = "auto"
    """auto continues from the newest whole checkpoint; never starts over."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.max_steps is not None and self.num_epochs is not None:
            raise ValueError(
                f"max_steps ({self.max_steps}) and num_epochs ({self.num_epochs:g}) both set the "
                "length of the run: set one of them to null"
            )
        for knob, schedule in SCHEDULE_KNOBS.items():
            if self.schedule != schedule and getattr(self, knob) != default_of(type(self), knob):
                raise ValueError(
                    f"{knob} belongs to schedule={schedule}, but the schedule is {self.schedule}: "
                    "take one of the two out"
                )
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ValueError("min_lr_ratio says where a schedule ends, and constant never falls")
        if self.max_steps is not None:
            self._check_warmup(self.max_steps)
        if self.early_stopping is not None and self.eval_every is None:
            raise ValueError("early_stopping needs eval_every: the steps between evaluations")
        return self

    def deciding_knobs(self) -> JsonObject:
        """Return, as JSON values, the knobs that decide which weights come out."""
        knobs = set(RESULT_KNOBS)
        if self.early_stopping is not None:
            knobs |= {"early_stopping", "eval_every"}
        knobs |= {
            name for name in LATER_KNOBS if getattr(self, name) != default_of(type(self), name)
        }
        return self.model_dump(mode="json", include=knobs)

    def total_steps(self, num_rows: int) -> int:
        """Return the optimizer steps over `num_rows` rows; an epoch's last step may be short.

        Raises:
            LlmtuneError: the warm-up would be as long as the run.
        """
        if self.max_steps is not None:
            return self.max_steps
        steps = math.ceil((self.num_epochs or 1) * math.ceil(num_rows / self.batch_size))
        self._check_warmup(steps)
        return steps

    def num_warmup_steps(self, total_steps: int) -> int:
        """Return the steps over which the learning rate rises."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(self.warmup_ratio * total_steps)

    def _check_warmup(self, total_steps: int) -> None:
        if self.warmup_steps is not None and self.warmup_steps >= total_steps:
            raise LlmtuneError(
                f"train.warmup_steps is {self.warmup_steps}, but the run has {total_steps} steps: "
                "the learning rate would never reach its peak. Give fewer, or train longer"
            )


@dataclass(frozen=True)
class SuggestedRate:
    """A peak learning rate for LoRA, and where it is from."""

    learning_rate: float
    reason: str


def suggest_learning_rate(model_type: str, hidden_size: int | None) -> SuggestedRate:
    """Return the rate that is published for LoRA on a family: 5e-4 x (2000 / width) ^ exponent.

    The exponent was fitted on models of 1B parameters and more, so narrower ones count as
    `NARROWEST`. For other families there is no such fit.

    Source: the hyperparameter guide of Thinking Machines' Tinker cookbook, after Schulman et al.,
    "LoRA Without Regret" (2025).
    """
    name = next((name for name in RATE_EXPONENTS if model_type.startswith(name)), None)
    if name is None or hidden_size is None:
        return SuggestedRate(2e-4, f"common for LoRA; no rule is published for {model_type}")
    width = max(hidden_size, NARROWEST)
    rate = 5e-4 * (2000 / width) ** RATE_EXPONENTS[name]
    rate = float(f"{rate:.1e}")
    return SuggestedRate(rate, f"the published rule for {name} of width {hidden_size}")


def check_reporters(report_to: Sequence[Reporter]) -> None:
    """Check that the package behind every tracker is installed, before anything is loaded.

    Raises:
        LlmtuneError: names every missing package at once, and how to install it.
    """
    missing = [name for name in report_to if find_spec(name) is None]
    if missing:
        raise LlmtuneError(
            f"train.report_to names {', '.join(missing)}, but this environment does not have the "
            f"package{'s' if len(missing) > 1 else ''}. Install with "
            f"`pip install {' '.join(missing)}`, or take {'them' if len(missing) > 1 else 'it'} "
            "out of train.report_to."
        )
