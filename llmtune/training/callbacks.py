"""Callbacks: what stops a run (nothing learned, broken, no better, asked to), and its pace."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtune.adapters.live import live_method
from llmtune.errors import LlmtuneError
from llmtune.io.stopping import Interruption
from llmtune.training.config import EarlyStopping
from llmtune.training.metrics import Clock
from llmtune.training.request import RunTotals
from llmtune.training.rows import Examples
from llmtune.training.step import StepRecord

CHECKED_STEPS = 2
CHECK_EVERY = 2
TOLERATED_STEPS_FP16 = 3
MAX_NAMES = 8
LARGEST_LIKELY_RATE = 0.1
"""AdamW moves every weight by about the learning rate; beyond this one step saturates a model."""

TOKEN_ROWS = ".trainable_tokens_delta."


class NoGradientStop(TrainerCallback):
    """Stops by step 2 if a trained tensor got no gradient.

    Some tensors get theirs in step 1 already (`Adapter.learns_at_once`), such as LoRA's B.
    """

    def __init__(self) -> None:
        self._waiting: set[str] | None = None
        self._steps = 0

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel,
        **kwargs: Any,
    ) -> None:
        """Check that gradients reach the adapter."""
        # The float16 scaler skips the first steps, so there the check is left to the loss.
        if args.fp16 or self._steps == CHECKED_STEPS:
            return
        self._steps += 1
        trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            # a token may be in later rows only; that it is in some is known
            if parameter.requires_grad and TOKEN_ROWS not in name
        }
        if self._waiting is None:
            self._waiting = set(trained)
        graded = [name for name in sorted(self._waiting) if trained[name].grad is not None]
        if graded:
            norms = torch.stack([trained[name].grad.abs().max() for name in graded]).tolist()
            self._waiting -= {name for name, norm in zip(graded, norms, strict=True) if norm != 0}
        method = live_method(model)
        must_learn = {
            name
            for name in self._waiting
            if self._steps == CHECKED_STEPS or method.learns_at_once(name)
        }
        if must_learn:
            names = ", ".join(sorted(must_learn)[:MAX_NAMES])
            why = (
                "They are frozen or cut off from the loss and would be saved unchanged. Take these "
                "modules out of adapter.target_modules."
            )
            if self._steps > 1 and args.learning_rate > LARGEST_LIKELY_RATE:
                why = (
                    f"The first step moved the weights so far (train.learning_rate is "
                    f"{args.learning_rate:g}) that nothing gets a gradient any more. Lower "
                    "train.learning_rate: adapters are usually trained with 1e-5 to 1e-3."
                )
            raise LlmtuneError(
                f"{len(must_learn)} of {len(trained)} trained tensors have had no gradient by step "
                f"{self._steps}: {names}{' ...' if len(must_learn) > MAX_NAMES else ''}. {why}"
            )


class NotFiniteStop(TrainerCallback):
    """Stops within three steps of a loss or gradient that is not finite, and names the rows.

    With float16 the gradient scaler skips single bad steps; there, three in a row stop the run.
    """

    def __init__(self, recent: Sequence[StepRecord], examples: Examples) -> None:
        self._recent = recent
        self._examples = examples
        self._bad_steps = 0

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check the losses since the last check."""
        last = state.global_step >= state.max_steps
        if state.global_step % CHECK_EVERY == 0 or last or control.should_save:
            self._check_losses()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Check the gradient norm of this log."""
        norm = logs.get("grad_norm")
        if norm is None or not self._recent:
            return
        is_finite = norm == norm and abs(norm) != float("inf")
        self._bad_steps = 0 if is_finite else self._bad_steps + 1
        if self._bad_steps >= (TOLERATED_STEPS_FP16 if args.fp16 else 1):
            self._stop(self._recent[-1], "gradient norm", range(1_000_000))

    def _check_losses(self) -> None:
        records = list(self._recent)
        if not records:
            return
        flat = torch.stack([loss for record in records for loss in record.losses])
        finite = iter(flat.isfinite().tolist())
        for record in records:
            bad = [index for index, _ in enumerate(record.losses) if not next(finite)]
            if bad:
                self._stop(record, "loss", bad)

    def _stop(self, record: StepRecord, what: str, micro_batches: Sequence[int]) -> None:
        rows = [
            row
            for index, group in enumerate(record.rows)
            if index in micro_batches
            for row in group
        ]
        examples = [self._examples[row] for row in rows[: 2 * MAX_NAMES]]
        places = ", ".join(f"{example.source}:{example.line}" for example in examples)
        raise LlmtuneError(
            f"the {what} of step {record.step} is not finite, so the run stops; earlier "
            f"checkpoints are kept. Its rows: {places}{' ...' if len(rows) > len(examples) else ''}"
            ". Look at these rows, lower train.learning_rate, or use model.dtype=bfloat16 or "
            "float32 if it is float16."
        )


class BestCheckpoint(TrainerCallback):
    """Remembers the best evaluation, saves it, and stops when it is not beaten any more."""

    def __init__(self, totals: RunTotals, stopping: EarlyStopping) -> None:
        self._totals = totals
        self._stopping = stopping

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Keep the best loss, and stop once it has not improved for too long."""
        loss = metrics.get(self._stopping.metric)
        if loss is None:
            return
        totals = self._totals
        known = math.inf if totals.best_eval_loss is None else totals.best_eval_loss
        if loss < known - self._stopping.min_delta:  # never true of NaN
            totals.best_eval_loss, totals.best_step = loss, state.global_step
            totals.stale_evaluations = 0
            control.should_save = True
            return
        totals.stale_evaluations += 1
        if totals.stale_evaluations >= self._stopping.patience and not control.should_training_stop:
            totals.has_stopped_early = True
            control.should_training_stop = control.should_save = True


class InterruptionStop(TrainerCallback):
    """Ends the run after the current step, with a checkpoint, once someone asked for it.

    An evaluation that is due is made up by the call that continues.
    """

    def __init__(self, interruption: Interruption, totals: RunTotals) -> None:
        self._interruption = interruption
        self._totals = totals

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save and stop instead of evaluating, if someone asked for it."""
        if self._interruption.signal_name:
            control.should_save = control.should_training_stop = True
            self._totals.owes_evaluation = control.should_evaluate
            control.should_evaluate = False


class MethodSteps(TrainerCallback):
    """Does what the adapter's method does beside learning by gradients (`Adapter.after_step`)."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel,
        **kwargs: Any,
    ) -> None:
        """Tell the method how many steps there are."""
        live_method(model).begin_steps(model, state.max_steps)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PeftModel,
        **kwargs: Any,
    ) -> None:
        """Let it act while the step's gradients are there; the trainer counts the step later."""
        live_method(model).after_step(model, state.global_step + 1)


class Pacing(TrainerCallback):
    """Starts the clock at the first step, not at the start-up before it, and paces the log.

    A continued run logs, evaluates and saves as its config says, not as the checkpoint did. A
    step that is evaluated, saved or last has its line of metrics, whatever `log_every` is.
    """

    def __init__(self, clock: Clock, reopen_window: Callable[[], None]) -> None:
        """Take what counts the time, and what restores the steps that were not logged yet."""
        self._clock = clock
        self._reopen_window = reopen_window

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Start the clock, and put this run's intervals in place of those in the checkpoint."""
        self._clock.start(state.global_step)
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        state.eval_steps = args.eval_steps
        self._reopen_window()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Log, save and evaluate when it is time."""
        is_last = state.global_step >= state.max_steps
        if control.should_evaluate or control.should_save or is_last:
            control.should_log = True
