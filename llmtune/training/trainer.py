"""trl's SFTTrainer with our batches, our loss and our checkpoints."""

import math
import operator
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from llmtune.io.run_dir import atomic_write_json
from llmtune.training.batch import SMALLEST_WEIGHT, EpochSampler
from llmtune.training.checkpoint import (
    PROGRESS_NAME,
    check_finite,
    checkpoint_dir,
    load_weights,
    remove_old_checkpoints,
    save_weights,
    write_checkpoint,
)
from llmtune.training.context import RunContext, StepRecord
from llmtune.training.fused.packing import move_to
from llmtune.training.loss import summed_loss
from llmtune.training.memory.measure import peak_bytes
from llmtune.training.metrics import MetricsLog
from llmtune.training.schedule import learning_rate_factor
from llmtune.training.source_losses import SourceLosses

REMEMBERED_STEPS = 4
# Rows that evaluation deals with at a time; micro-batches divide them like a training step's.
EVALUATION_ROWS = 64
KEPT_METRICS = ("eval_loss", "eval_tokens", "eval_seconds")


class AdapterTrainer(SFTTrainer):
    """Trains the adapter; one item of the data loader is one whole optimizer step.

    The collator splits a step into micro-batches and divides by the step's trained tokens, so the
    result does not depend on how it was split (see `StepCollator`).
    """

    def __init__(self, context: RunContext, metrics: MetricsLog, **trl_arguments: Any) -> None:
        self.context = context
        self.metrics = metrics
        self.recent: deque[StepRecord] = deque(maxlen=REMEMBERED_STEPS)
        self._seconds_a_step = 0.0
        super().__init__(**trl_arguments)
        self._source_losses = SourceLosses(context.train_sources, self.args.device)
        self.start_clock()

    def _send_telemetry(self) -> None:
        """Send nothing: nothing leaves the machine unasked."""

    # Order of the rows, learning rate, precision

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        return EpochSampler(len(train_dataset or self.train_dataset), self.context.seed)

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LambdaLR:
        """Build the schedule of `learning_rate_factor`, which starts above zero."""
        config = self.context.config
        warmup_steps = math.ceil(config.warmup_ratio * num_training_steps)
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,
            lambda step: learning_rate_factor(
                config.schedule, step, warmup_steps, num_training_steps
            ),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss_context_manager(self) -> torch.autocast:
        """Run the forward pass in the base model's 16-bit dtype; adapters stay float32."""
        dtype = self.context.autocast_dtype
        return torch.autocast(self.args.device.type, dtype=dtype, enabled=dtype is not None)

    # One step

    def training_step(
        self, model: nn.Module, inputs: dict, num_items_in_batch: object = None
    ) -> Tensor:
        """Run every micro-batch of a step forward and backward; returns the step's mean loss."""
        if not model.training:
            model.train()
        rows = inputs["rows"]
        totals = self.context.totals
        totals.tokens += inputs["tokens"]
        totals.trained_tokens += inputs["trained_tokens"]
        losses = []
        for micro_batch in self._prepare_inputs(inputs["micro_batches"]):
            self._source_losses.prepare(micro_batch)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, micro_batch)
            self._source_losses.add(micro_batch)
            self.accelerator.backward(loss)
            losses.append(loss.detach())
        if self.context.protection is not None:
            self.context.protection.add_gradients(
                self.state.global_step,
                self.compute_loss_context_manager,
                scale=self._loss_scale(),
            )
        self.recent.append(StepRecord(self.state.global_step + 1, rows, losses))
        return torch.stack(losses).sum()

    def _loss_scale(self) -> float:
        """What float16 training multiplies its losses by before backward."""
        scaler = self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: object = None,
    ) -> Tensor:
        """Return a micro-batch's share of the step's loss; nothing here waits for the device."""
        assert not return_outputs, "no logits are kept: there are no outputs to return"
        return summed_loss(self.model, inputs, self.context.head)

    def floating_point_ops(self, inputs: dict) -> int:
        """Count nothing: tokens are what the metrics report."""
        return 0

    # Evaluation and metrics

    def evaluation_loop(
        self,
        dataloader: object,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the mean loss of a trained token, over all evaluation rows and by source."""
        self.model.eval()
        started = time.perf_counter()
        losses: list[float] = []
        weights: list[float] = []
        tokens = 0
        with self._aside(), torch.no_grad():
            for rows in self.context.evaluation_rows.values():
                loss, weight, trained = self._evaluate_rows(rows)
                losses.append(loss / weight)
                weights.append(weight)
                tokens += trained
                if self.context.interruption.signal_name:
                    return EvalLoopOutput(None, None, {}, 0)
        metrics = {
            "eval_loss": sum(map(operator.mul, losses, weights)) / sum(weights),
            "eval_tokens": tokens,
            "eval_seconds": time.perf_counter() - started,
        }
        names = self.context.evaluation_rows
        if len(names) > 1:
            metrics |= {f"eval_loss/{name}": one for name, one in zip(names, losses, strict=True)}
        return EvalLoopOutput(None, None, metrics, sum(map(len, names.values())))

    def _evaluate_rows(self, rows: list[int]) -> tuple[float, float, int]:
        """Return the summed loss of some rows, its weight, and the tokens it is over."""
        summed = torch.zeros((), device=self.args.device, dtype=torch.float64)
        weight, tokens = 0.0, 0
        for start in range(0, len(rows), EVALUATION_ROWS):
            if self.context.interruption.signal_name:
                break
            inputs = self.data_collator.collate(rows[start : start + EVALUATION_ROWS])
            for micro_batch in inputs["micro_batches"]:
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model, move_to(micro_batch, self.args.device))
                summed += loss.double() * inputs["target_weight"]
            weight += inputs["target_weight"]
            tokens += inputs["trained_tokens"]
        return summed.item(), max(weight, SMALLEST_WEIGHT), tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write one line of metrics and pass it on to the trackers."""
        step = self.state.global_step
        if "loss" in logs:
            logs |= self._source_losses.take()
            if self.context.protection is not None:
                logs |= self.context.protection.take()
            logs |= self._measure_speed()
            self.context.totals.final_loss = logs["loss"]
            self._write({"step": step, "epoch": self.state.epoch, **logs})
        elif "eval_loss" in logs:
            self.context.totals.final_eval_loss = logs["eval_loss"]
            kept = {name: value for name, value in logs.items() if name.startswith(KEPT_METRICS)}
            self._write({"step": step, "epoch": self.state.epoch, **kept})
        super().log(logs, start_time)

    def _write(self, line: dict[str, float]) -> None:
        self.metrics.write(line)
        steps_left = self.state.max_steps - line["step"]
        seconds_left = steps_left * self._seconds_a_step
        self.context.progress.update({**line, "seconds_left": seconds_left}, self.state.max_steps)

    def _measure_speed(self) -> dict[str, float]:
        """Return the totals, and the speed since the last line without evaluations and saves."""
        now = time.perf_counter()
        totals = self.context.totals
        seconds = now - self._clock - self._aside_seconds
        totals.seconds += now - self._clock
        self._seconds_a_step = seconds / max(self.state.global_step - self._clock_step, 1)
        measured = {
            "tokens": totals.tokens,
            "trained_tokens": totals.trained_tokens,
            "tokens_per_second": (totals.tokens - self._clock_tokens) / max(seconds, 1e-9),
            "seconds": totals.seconds,
            "peak_bytes": peak_bytes(self.args.device),
        }
        self.start_clock()
        return measured

    def stop_clock(self) -> None:
        """Add the time since the last line of metrics to the total."""
        self.context.totals.seconds += time.perf_counter() - self._clock
        self.start_clock()

    def start_clock(self) -> None:
        """Start counting time and speed here."""
        self._clock = time.perf_counter()
        self._clock_step = self.state.global_step
        self._clock_tokens = self.context.totals.tokens
        self._aside_seconds = 0.0

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Keep what is not training out of the speed."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._aside_seconds += time.perf_counter() - started

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        context = self.context
        target = checkpoint_dir(context.run.checkpoints_dir, self.state.global_step)
        with self._aside():
            check_finite(self.model, self.state.global_step)
            write_checkpoint(target, self._write_files)
            remove_old_checkpoints(
                target,
                keep=context.config.keep_checkpoints,
                best_step=context.totals.best_step,
            )

    def _write_files(self, directory: Path) -> None:
        save_weights(self.model, directory)
        self._save_optimizer_and_scheduler(str(directory))
        self._save_scaler(str(directory))
        self._save_rng_state(str(directory))
        self.state.save_to_json(str(directory / "trainer_state.json"))
        context = self.context
        progress = {
            "identity": dict(context.identity),
            "totals": vars(context.totals),
            "choices": dict(context.choices),
        }
        atomic_write_json(directory / PROGRESS_NAME, progress)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_weights(self.model, Path(resume_from_checkpoint))
