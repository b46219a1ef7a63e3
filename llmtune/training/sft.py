"""Train an adapter: rehearse, choose, run, and give the model back."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback
from transformers.integrations import TensorBoardCallback

from llmtune.data.example import IGNORE_INDEX
from llmtune.errors import LlmtuneError, RunInterrupted
from llmtune.fingerprint import hash_json
from llmtune.training.adapter_state import load_weights
from llmtune.training.arguments import build_arguments
from llmtune.training.borrow import borrowed
from llmtune.training.checkpoint import (
    checkpoint_dir,
    find_checkpoint,
    remove_all_checkpoints,
    step_of,
)
from llmtune.training.config import TrainConfig
from llmtune.training.interrupt import catch_interruption
from llmtune.training.metrics import MetricsLog
from llmtune.training.progress import ProgressLine
from llmtune.training.rehearsal import is_out_of_memory, rehearse_save
from llmtune.training.reporters import check_reporters
from llmtune.training.request import TrainRequest, TrainResult, row_lengths
from llmtune.training.setup import Setup, set_up
from llmtune.training.trainer import AdapterTrainer, RunContext, peak_bytes
from llmtune.training.watch import build_watches

__all__ = ["TrainRequest", "TrainResult", "train_adapter"]

# What changes the trained weights; the other knobs may differ when a run is continued.
RESULT_KNOBS = {
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
    _check_rows(config, request)
    progress = ProgressLine(quiet=request.quiet)
    with ExitStack() as stack:
        stack.callback(progress.stop)
        interruption = stack.enter_context(catch_interruption())
        stack.enter_context(borrowed(request.model))
        rehearse_save(request.model, request.tokenizer, request.run)
        setup = set_up(config, request, stack)
        for name, choice in setup.choices.items():
            progress.note(f"{name}: {choice}")
        own = {"training section or seed": _own_identity(config, request)}
        context = RunContext(
            config=config,
            run=request.run,
            identity={**request.identity, **own},
            head=setup.head,
            autocast_dtype=setup.autocast_dtype,
            progress=progress,
            interruption=interruption,
            seed=request.seed,
        )
        return _run(request, setup, context, stack)


def _check_rows(config: TrainConfig, request: TrainRequest) -> None:
    if not len(request.train):
        raise LlmtuneError("there are no training rows: every source under data.train is empty")
    if config.early_stopping and not len(request.evaluation):
        raise LlmtuneError("train.early_stopping needs rows under data.evaluation, and has none")
    for examples in (request.train, request.evaluation):
        untrained = [
            example for example in examples if all(n == IGNORE_INDEX for n in example.labels[1:])
        ]
        if untrained:
            first = untrained[0]
            raise LlmtuneError(
                f"{len(untrained)} rows have no token to train, the first is {first.source}:"
                f"{first.line}. Remove them, or set data.on_bad_row=drop."
            )


def _own_identity(config: TrainConfig, request: TrainRequest) -> str:
    return hash_json({**config.model_dump(mode="json", include=RESULT_KNOBS), "seed": request.seed})


def _run(request: TrainRequest, setup: Setup, context: RunContext, stack: ExitStack) -> TrainResult:
    """Train from the newest checkpoint, or from the start, to the end."""
    config, run, totals = context.config, context.run, context.totals
    checkpoint = None
    if config.resume == "never":
        remove_all_checkpoints(run.checkpoints_dir)
    else:
        checkpoint = find_checkpoint(run.checkpoints_dir, context.identity, context.progress.note)
    steps = 0
    if checkpoint:
        steps = step_of(checkpoint)
        totals.restore(checkpoint)
        load_weights(request.model, checkpoint)
        context.progress.note(f"continuing after step {steps}")
    total_steps = config.total_steps(len(request.train))
    if steps < total_steps and not totals.has_stopped_early:
        metrics = MetricsLog(run.metrics_path, resumed_step=steps)
        stack.callback(metrics.close)
        trainer = _build_trainer(request, setup, context, metrics)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise LlmtuneError(
                f"out of memory after step {trainer.state.global_step} of {total_steps}; earlier "
                "checkpoints are kept. Set train.micro_batch_size to a smaller number, or "
                "train.gradient_checkpointing=true, and run the same command to continue."
            ) from error
        trainer.stop_clock()
        steps = trainer.state.global_step
    if context.interruption.signal_name and steps < total_steps and not totals.has_stopped_early:
        raise RunInterrupted(
            f"stopped by {context.interruption.signal_name} after step {steps} of {total_steps}; "
            f"saved in {checkpoint_dir(run.checkpoints_dir, steps)}. The same command continues."
        )
    return _finish(request, setup, context, steps)


def _build_trainer(
    request: TrainRequest, setup: Setup, context: RunContext, metrics: MetricsLog
) -> AdapterTrainer:
    num_train = len(request.train)
    # Evaluation rows by length: the least padding, and batches of one size.
    order = np.argsort(row_lengths(request.evaluation), kind="stable") + num_train
    with _kept_precision(request.model):
        trainer = AdapterTrainer(
            context,
            metrics,
            model=request.model,
            args=build_arguments(
                context.config,
                request.run,
                num_rows=(num_train, len(order)),
                device=request.model.get_input_embeddings().weight.device,
                uses_fp16=setup.autocast_dtype == torch.float16,
                seed=request.seed,
            ),
            data_collator=setup.collator,
            train_dataset=Dataset.from_dict({"row": list(range(num_train))}),
            eval_dataset=Dataset.from_dict({"row": order.tolist()}) if len(order) else None,
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


def _finish(request: TrainRequest, setup: Setup, context: RunContext, steps: int) -> TrainResult:
    totals = context.totals
    best_checkpoint = None
    if totals.best_step is not None:
        best_checkpoint = checkpoint_dir(context.run.checkpoints_dir, totals.best_step)
        if totals.best_step != steps:
            load_weights(request.model, best_checkpoint)
            context.progress.note(
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
        choices=setup.choices,
    )
