"""Train an adapter: rehearse, choose, run, and give the model back."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback
from transformers.integrations import TensorBoardCallback

from llmtune.errors import LlmtuneError, RunInterrupted
from llmtune.io.fingerprint import hash_json
from llmtune.io.interrupt import catch_interruption
from llmtune.training.arguments import build_arguments
from llmtune.training.borrow import borrowed
from llmtune.training.callbacks import build_watches
from llmtune.training.checkpoint import (
    checkpoint_dir,
    find_checkpoint,
    load_weights,
    read_progress,
    remove_all_checkpoints,
    step_of,
)
from llmtune.training.config import TrainConfig, check_reporters
from llmtune.training.context import RunContext, RunTotals
from llmtune.training.memory.dry_run import is_out_of_memory, rehearse_save
from llmtune.training.memory.measure import peak_bytes
from llmtune.training.metrics import MetricsLog, ProgressLine
from llmtune.training.protect.penalties import Protection
from llmtune.training.request import (
    TrainRequest,
    TrainResult,
    find_untrained,
    group_by_source,
    name_sources,
)
from llmtune.training.setup import Setup, set_up
from llmtune.training.trainer import AdapterTrainer

__all__ = ["TrainRequest", "TrainResult", "train_adapter"]


def train_adapter(config: TrainConfig, request: TrainRequest) -> TrainResult:
    """Train the adapter of `request.model`, or continue a run that was interrupted.

    The model keeps the final weights (those of the best evaluation with early stopping) and is
    otherwise as it came. Writes `metrics.jsonl` and checkpoints into the run's directory; the
    adapter itself is for the caller to save.

    Raises:
        LlmtuneError: something the user gave is wrong, does not fit, or breaks on the way.
        RunInterrupted: SIGINT or SIGTERM came; a checkpoint was saved, the same call continues.
    """
    check_reporters(config.report_to)
    _check_request(config, request)
    progress = ProgressLine(quiet=request.quiet)
    identity = {**request.identity, "training section or seed": _own_identity(config, request)}
    with ExitStack() as stack:
        stack.callback(progress.stop)
        interruption = stack.enter_context(catch_interruption())
        stack.enter_context(borrowed(request.model))
        rehearse_save(request.model, request.tokenizer, request.run)
        start = _find_start(config, request, identity, progress)
        is_done = start.steps >= start.total_steps or start.totals.has_stopped_early
        if start.checkpoint and is_done:
            choices = read_progress(start.checkpoint)["choices"]
            return _finish(request, start.totals, start.steps, choices, progress)
        setup = set_up(config, request, stack)
        for name, choice in setup.choices.items():
            progress.note(f"{name}: {choice}")
        if interruption.signal_name:
            raise RunInterrupted(
                f"stopped by {interruption.signal_name} before step {start.steps + 1} of "
                f"{start.total_steps}. The same command continues."
            )
        protection = _protect(request, setup)
        context = RunContext(
            config=config,
            run=request.run,
            identity=identity,
            head=setup.head,
            autocast_dtype=setup.autocast_dtype,
            progress=progress,
            interruption=interruption,
            seed=request.seed,
            evaluation_rows=group_by_source(request.evaluation, len(request.train)),
            train_sources=name_sources(request.train),
            choices=setup.choices,
            totals=start.totals,
            protection=protection,
        )
        metrics = MetricsLog(request.run.metrics_path, resumed_step=start.steps)
        stack.callback(metrics.close)
        steps = _run(_build_trainer(request, setup, context, metrics), start)
        result = _finish(request, start.totals, steps, setup.choices, progress)
        return replace(result, interrupted_by=interruption.signal_name)


def _protect(request: TrainRequest, setup: Setup) -> Protection | None:
    """Set up the penalties and try them once, on the longest rows."""
    if request.protection is None or not request.protection.config.needs_penalty:
        return None
    protection = Protection(
        request.model, request.protection, setup.head, setup.collator.build, seed=request.seed
    )
    device_type = request.model.get_input_embeddings().weight.device.type
    dtype = setup.autocast_dtype
    protection.rehearse(lambda: torch.autocast(device_type, dtype=dtype, enabled=dtype is not None))
    return protection


class _Start(NamedTuple):
    """Where a run begins: at a checkpoint, or at step 0."""

    checkpoint: Path | None
    steps: int
    total_steps: int
    totals: RunTotals


def _check_request(config: TrainConfig, request: TrainRequest) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LlmtuneError(
            f"started as one of {os.environ['WORLD_SIZE']} processes, but training runs in one: "
            "start llmtune without torchrun or accelerate launch"
        )
    if not len(request.train):
        raise LlmtuneError("there are no training rows: every source under data.train is empty")
    if config.early_stopping and not len(request.evaluation):
        raise LlmtuneError("train.early_stopping needs rows under data.evaluation, and has none")
    for examples in (request.train, request.evaluation):
        untrained = find_untrained(examples)
        if untrained:
            first = examples[untrained[0]]
            raise LlmtuneError(
                f"{len(untrained)} rows have no token to train, the first is {first.source}:"
                f"{first.line}. Remove them, or set data.on_bad_row=drop."
            )


def _own_identity(config: TrainConfig, request: TrainRequest) -> str:
    return hash_json({**config.deciding_knobs(), "seed": request.seed})


def _find_start(
    config: TrainConfig,
    request: TrainRequest,
    identity: Mapping[str, str],
    progress: ProgressLine,
) -> _Start:
    """Find what an earlier call left, and load the adapter from it."""
    total_steps = config.total_steps(len(request.train))
    checkpoints_dir = request.run.checkpoints_dir
    if config.resume == "never":
        remove_all_checkpoints(checkpoints_dir)
    checkpoint = find_checkpoint(checkpoints_dir, identity, progress.note)
    totals = RunTotals()
    if checkpoint is None:
        return _Start(None, 0, total_steps, totals)
    load_weights(request.model, checkpoint)
    totals.restore(checkpoint)
    progress.note(f"continuing after step {step_of(checkpoint)} of {total_steps}")
    return _Start(checkpoint, step_of(checkpoint), total_steps, totals)


def _run(trainer: AdapterTrainer, start: _Start) -> int:
    """Train to the end; returns the steps done."""
    try:
        resumed = str(start.checkpoint) if start.checkpoint else None
        trainer.train(resume_from_checkpoint=resumed)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise LlmtuneError(
            f"out of memory after step {trainer.state.global_step} of {start.total_steps}; earlier "
            "checkpoints are kept. Set train.micro_batch_size to a smaller number, or "
            "train.gradient_checkpointing=true, and run the same command to continue."
        ) from error
    trainer.stop_clock()
    context, steps = trainer.context, trainer.state.global_step
    is_done = steps >= start.total_steps or context.totals.has_stopped_early
    if context.interruption.signal_name and not is_done:
        raise RunInterrupted(
            f"stopped by {context.interruption.signal_name} after step {steps} of "
            f"{start.total_steps}; saved in {checkpoint_dir(context.run.checkpoints_dir, steps)}. "
            "The same command continues."
        )
    return steps


def _build_trainer(
    request: TrainRequest, setup: Setup, context: RunContext, metrics: MetricsLog
) -> AdapterTrainer:
    num_rows = (len(request.train), len(request.evaluation))
    with _kept_precision(request.model):
        trainer = AdapterTrainer(
            context,
            metrics,
            model=request.model,
            args=build_arguments(
                context.config,
                request.run,
                num_rows=num_rows,
                device=request.model.get_input_embeddings().weight.device,
                uses_fp16=setup.autocast_dtype == torch.float16,
                seed=request.seed,
            ),
            data_collator=setup.collator,
            train_dataset=Dataset.from_dict({"row": list(range(num_rows[0]))}),
            # Only says that there is one: `AdapterTrainer.evaluation_loop` has rows of its own.
            eval_dataset=Dataset.from_dict({"row": [0]}) if num_rows[1] else None,
            processing_class=request.tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    for tracker in trainer.callback_handler.callbacks:
        if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:
            tracker.logging_dir = str(request.run.path / "tensorboard")
    for watch in build_watches(trainer, setup.collator.examples):
        trainer.add_callback(watch)
    return trainer


@contextmanager
def _kept_precision(model: PeftModel) -> Iterator[None]:
    """Keep the adapter's float32 weights through trl's constructor.

    Over a quantized base it rounds them to bfloat16.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.data for parameter in trained]
    try:
        yield
    finally:
        for parameter, value in zip(trained, values, strict=True):
            parameter.data = value


def _finish(
    request: TrainRequest,
    totals: RunTotals,
    steps: int,
    choices: Mapping[str, str],
    progress: ProgressLine,
) -> TrainResult:
    """Load the best weights where early stopping asks for them, and sum up."""
    assert totals.final_loss is not None, "the last step is always logged"
    best_checkpoint = None
    if totals.best_step is not None:
        checkpoint = checkpoint_dir(request.run.checkpoints_dir, totals.best_step)
        best_checkpoint = str(checkpoint.relative_to(request.run.path))
        if totals.best_step != steps:
            load_weights(request.model, checkpoint)
            progress.note(
                f"kept the weights of step {totals.best_step}, the best evaluation "
                f"({totals.best_eval_loss:.4f})"
            )
    return TrainResult(
        steps=steps,
        tokens=totals.tokens,
        trained_tokens=totals.trained_tokens,
        seconds=totals.seconds,
        peak_bytes=peak_bytes(request.model.get_input_embeddings().weight.device),
        final_loss=totals.final_loss,
        final_eval_loss=totals.final_eval_loss,
        best_checkpoint=best_checkpoint,
        stopped_by="early_stopping" if totals.has_stopped_early else "max_steps",
        choices=dict(choices),
    )
