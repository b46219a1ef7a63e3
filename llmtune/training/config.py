"""The knobs of the training stage."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from llmtune.errors import LlmtuneError
from llmtune.schema import Section
from llmtune.training.objectives import DEFAULT_OBJECTIVE, ObjectiveConfig

Reporter = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class EarlyStopping(Section):
    """Stop when the evaluation loss no longer falls, and keep the best evaluation's weights."""

    metric: Literal["eval_loss"] = "eval_loss"
    """What must keep falling."""
    patience: PositiveInt = 3
    """Evaluations in a row without an improvement before the run stops."""
    min_delta: float = Field(0.0, ge=0)
    """Fall of the metric (nats a token) that counts as an improvement."""


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


class TrainConfig(Section):
    """How the adapter is trained.

    `max_steps` or `num_epochs` decides the length of the run; giving both is an error, giving
    neither is one pass over the data.
    """

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
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient norm above which gradients are scaled down; 0 is never."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw: fused, float32 state; adamw_8bit: bitsandbytes, 8-bit state."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """Strength of NEFTune's noise on the embeddings (5 is usual); null is none."""
    early_stopping: EarlyStopping | None = None
    """Stop when the evaluation loss stops falling; null runs to the end."""
    eval_every: PositiveInt | None = None
    """Steps between evaluations; null evaluates once, at the end."""
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
        if self.early_stopping is not None and self.eval_every is None:
            raise ValueError("early_stopping needs eval_every: the steps between evaluations")
        return self

    def deciding_knobs(self) -> dict[str, Any]:
        """Return, as JSON values, the knobs that decide which weights come out."""
        knobs = set(RESULT_KNOBS)
        if self.early_stopping is not None:
            knobs |= {"early_stopping", "eval_every"}
        if self.objective != DEFAULT_OBJECTIVE:  # runs of before this knob have no other
            knobs |= {"objective"}
        return self.model_dump(mode="json", include=knobs)

    def total_steps(self, num_rows: int) -> int:
        """Return the optimizer steps over `num_rows` rows; an epoch's last step may be short."""
        if self.max_steps is not None:
            return self.max_steps
        return math.ceil((self.num_epochs or 1) * math.ceil(num_rows / self.batch_size))


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
