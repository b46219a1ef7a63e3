"""Train an adapter: try, choose, run, and give the model back."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from socket import gethostname
from typing import Any, cast

from peft import PeftModel

from llmtune.errors import LlmtuneError, RunInterrupted
from llmtune.io.fingerprint import JsonObject, hash_json
from llmtune.io.processes import refuse_unjoined
from llmtune.io.stopping import Interruption, catch_interruption
from llmtune.models.probing import is_out_of_memory
from llmtune.training.checkpoint import (
    DamagedCheckpointError,
    check_files,
    checkpoint_dir,
    find_start,
    load_weights,
    read_progress,
    remove_all_checkpoints,
    step_of,
)
from llmtune.training.config import TrainConfig, check_reporters
from llmtune.training.memory.dry_run import dry_run_save
from llmtune.training.memory.measure import peak_bytes
from llmtune.training.metrics import MetricsLog, ProgressLine
from llmtune.training.reduction import Stopping
from llmtune.training.request import RunTotals, Start, TrainRequest, TrainResult
from llmtune.training.rows import find_untrained
from llmtune.training.setup import add_protection, float32_weights, set_up
from llmtune.training.trainer import build_trainer, restored_model


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
    processes = request.processes
    progress = ProgressLine(quiet=request.quiet)
    with ExitStack() as stack:
        stack.callback(progress.stop)
        heard = stack.enter_context(catch_interruption())
        stopping = Stopping(processes, heard)
        interruption = stopping.agreed
        stack.enter_context(restored_model(request.model))
        stack.enter_context(float32_weights(request.model))
        if processes.is_first:
            dry_run_save(request.model, request.tokenizer, request.run)
        start = _find_start(config, request, progress)
        if start.checkpoint and start.is_done:
            choices = read_progress(start.checkpoint)["choices"]
            return _finish(request, start, start.steps, choices, progress)
        stack.enter_context(processes.connected(_device_type(request.model)))
        setup = set_up(config, request, stack)
        for name, choice in setup.choices.items():
            progress.note(f"{name}: {choice}")
        stopping.agree()
        _stop_if_asked(interruption, start)
        setup = add_protection(setup, request)
        metrics = None
        if processes.is_first:
            metrics = MetricsLog(
                request.run.metrics_path,
                resumed_step=start.steps,
                without_evaluation=start.totals.owes_evaluation,
                screen=progress,
                total_steps=start.total_steps,
            )
            stack.callback(metrics.close)
        trainer = build_trainer(config, request, setup, start, metrics, stopping)
        if start.checkpoint and start.totals.owes_evaluation:
            trainer.make_up_evaluation(start.checkpoint)
            if start.is_done:
                return _finish(request, start, start.steps, setup.choices, progress)
            _stop_if_asked(interruption, start)
        try:
            trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise _out_of_memory(trainer.state.global_step, start) from error
        steps = trainer.state.global_step
        trainer.clock.stop(steps)
        if interruption.signal_name and not start.totals.is_done(steps, start.total_steps):
            processes.meet()  # the first one may be writing the checkpoint still
            raise RunInterrupted(
                f"stopped by {interruption.signal_name} after step {steps} of "
                f"{start.total_steps}; saved in "
                f"{checkpoint_dir(request.run.checkpoints_dir, steps)}. The same command continues."
            )
        result = _finish(request, start, steps, setup.choices, progress)
        return replace(result, interrupted_by=interruption.signal_name or heard.signal_name)


def _device_type(model: PeftModel) -> str:
    return str(model.get_input_embeddings().weight.device.type)


def _stop_if_asked(interruption: Interruption, start: Start) -> None:
    if interruption.signal_name:
        raise RunInterrupted(
            f"stopped by {interruption.signal_name} before step {start.steps + 1} of "
            f"{start.total_steps}. The same command continues."
        )


def _check_request(config: TrainConfig, request: TrainRequest) -> None:
    refuse_unjoined()
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


def _find_start(config: TrainConfig, request: TrainRequest, progress: ProgressLine) -> Start:
    """Find what an earlier call left; the first process looks, and the others begin there, too."""
    own = hash_json({**config.deciding_knobs(), "seed": request.seed})
    identity = {**request.identity, "training section or seed": own}
    total_steps = config.total_steps(len(request.train))

    def find() -> JsonObject:
        if config.resume == "never":
            remove_all_checkpoints(request.run.checkpoints_dir)
        start = find_start(
            request.run.checkpoints_dir,
            identity,
            request.model,
            total_steps=total_steps,
            say=progress.note,
        )
        checkpoint = "" if start.checkpoint is None else str(start.checkpoint.absolute())
        return {"checkpoint": checkpoint, "totals": vars(start.totals)}

    found = request.processes.share(find)
    checkpoint = Path(str(found["checkpoint"])) if found["checkpoint"] else None
    if checkpoint is not None and not checkpoint.is_dir():
        raise LlmtuneError(
            f"{checkpoint}: the process that runs the command continues from it, and this one on "
            f"{gethostname()} does not see it. All machines need one run_dir: put it on a disk "
            "that they share"
        )
    totals = RunTotals(**cast(dict[str, Any], found["totals"]))
    steps = 0 if checkpoint is None else step_of(checkpoint)
    return Start(checkpoint, steps, total_steps, totals, identity)


def _out_of_memory(step: int, start: Start) -> LlmtuneError:
    return LlmtuneError(
        f"out of memory after step {step} of {start.total_steps}; earlier checkpoints are kept. "
        "Set train.micro_batch_size to a smaller number, or train.gradient_checkpointing=true, "
        "and run the same command to continue."
    )


def _require_whole(best: Path) -> None:
    """Check that the weights that early stopping keeps are those that were evaluated."""
    try:
        check_files(best)
    except DamagedCheckpointError as error:
        raise LlmtuneError(
            f"{best} is damaged ({error}), and its weights are the best of this run, which early "
            "stopping keeps: train again with --force"
        ) from error


def _finish(
    request: TrainRequest,
    start: Start,
    steps: int,
    choices: Mapping[str, str],
    progress: ProgressLine,
) -> TrainResult:
    """Load the best weights if early stopping asks for them, and sum up."""
    totals = start.totals
    assert totals.final_loss is not None, "the last step is always logged"
    best_checkpoint = None
    if totals.best_step is not None:
        checkpoint = checkpoint_dir(request.run.checkpoints_dir, totals.best_step)
        best_checkpoint = str(checkpoint.relative_to(request.run.path))
        if totals.best_step != steps:
            _require_whole(checkpoint)
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
