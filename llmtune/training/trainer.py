"""trl's trainer around our step: what is ours in it, and what holds the rest of it off."""

import copy
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PrinterCallback,
    TrainerState,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig, SFTTrainer

from llmtune.errors import LlmtuneError
from llmtune.io.run_dir import RunDir, atomic_write_json
from llmtune.training.batch import StepRows
from llmtune.training.callbacks import (
    BestCheckpoint,
    InterruptionStop,
    MethodSteps,
    NoGradientStop,
    NotFiniteStop,
    Pacing,
)
from llmtune.training.checkpoint import (
    CHECKSUMS_NAME,
    PROGRESS_NAME,
    Progress,
    check_finite,
    checkpoint_dir,
    load_weights,
    read_progress,
    remove_old_checkpoints,
    save_weights,
    write_checkpoint,
)
from llmtune.training.config import TrainConfig
from llmtune.training.metrics import Clock, MetricsLog
from llmtune.training.objectives.base import OpenSums
from llmtune.training.optimizers import OPTIMIZERS, group_parameters, learning_rate_factor
from llmtune.training.reduction import Reduction, Stopping
from llmtune.training.request import Start, TrainRequest
from llmtune.training.rows import EpochSampler, group_by_source, name_sources
from llmtune.training.setup import Setup, check_float32
from llmtune.training.step import TrainingStep

KEPT_METRICS = ("eval_loss", "eval_tokens", "eval_seconds")


def build_trainer(
    config: TrainConfig,
    request: TrainRequest,
    setup: Setup,
    start: Start,
    metrics: MetricsLog | None,
    stopping: Stopping,
) -> "AdapterTrainer":
    """Return the trainer with its callbacks; those that read what others decided come last.

    `metrics` is None in all processes but the first.
    """
    num_rows = (len(request.train), len(request.evaluation))
    with _kept_precision(request.model):
        trainer = AdapterTrainer(
            config,
            request,
            setup,
            start,
            metrics,
            stopping,
            model=request.model,
            args=build_arguments(
                config
                if request.processes.is_first
                else config.model_copy(update={"report_to": ()}),
                request.run,
                setup,
                num_rows=num_rows,
                seed=request.seed,
            ),
            data_collator=setup.collator,
            train_dataset=Dataset.from_dict({"row": list(range(num_rows[0]))}),
            # Only says that there is one: `AdapterTrainer.evaluation_loop` has rows of its own.
            eval_dataset=Dataset.from_dict({"row": [0]}) if num_rows[1] else None,
            processing_class=request.tokenizer,
        )
    check_float32(request.model)
    trainer.remove_callback(PrinterCallback)
    for tracker in trainer.callback_handler.callbacks:
        if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:
            tracker.logging_dir = str(request.run.path / "tensorboard")
    early = config.early_stopping
    for callback in (
        NoGradientStop(),
        MethodSteps(),
        *([BestCheckpoint(start.totals, early)] if early else []),
        Pacing(trainer.clock, trainer.reopen_window),
        # after Pacing: a step has the line of metrics that it has without an interruption
        InterruptionStop(stopping.agreed, start.totals),
        NotFiniteStop(trainer.step.recent, setup.collator.examples),
    ):
        trainer.add_callback(callback)
    return trainer


class AdapterTrainer(SFTTrainer):
    """Trains the adapter; one item of the data loader is one whole optimizer step."""

    def __init__(
        self,
        config: TrainConfig,
        request: TrainRequest,
        setup: Setup,
        start: Start,
        metrics: MetricsLog | None,
        stopping: Stopping,
        **trl_arguments: Any,
    ) -> None:
        self._config = config
        self._request = request
        self._start = start
        self._metrics_log = metrics
        self._stopping = stopping
        self._choices = setup.choices
        self._reduction: Reduction | None = None
        if request.processes.are_many:
            self._reduction = Reduction(request.model, stopping)
            self._reduction.start_equal()
        sources = name_sources(request.train)
        self.step = TrainingStep(setup, sources, request.processes, self._reduction)
        self.clock = Clock(start.totals)
        super().__init__(**trl_arguments)
        self._evaluation_rows = group_by_source(request.evaluation, len(request.train))

    # One step

    def training_step(
        self, model: nn.Module, inputs: StepRows, num_items_in_batch: object = None
    ) -> Tensor:
        """Run the rows of one optimizer step forward and backward (see `TrainingStep`)."""
        if not model.training:
            model.train()
        totals = self._start.totals
        totals.tokens += inputs["tokens"]
        totals.trained_tokens += inputs["trained_tokens"]
        scaler = self.accelerator.scaler  # of float16 training
        if scaler is not None and not inputs["micro_batches"]:
            scaler.scale(torch.zeros((), device=self.args.device))  # it begins with its first loss
        return self.step.run(
            inputs,
            self.state.global_step,
            self.accelerator.backward,
            loss_scale=1.0 if scaler is None else float(scaler.get_scale()),
        )

    def evaluation_loop(self, *_args: Any, **_kwargs: Any) -> EvalLoopOutput:
        """Return the mean loss of a trained token, over all evaluation rows and by source."""
        started = time.perf_counter()
        with self.clock.aside():
            metrics = self.step.evaluate(self._evaluation_rows, lambda: self._stopping.is_heard)
        if metrics is None:
            self._stopping.agree()
            self._start.totals.owes_evaluation = True
            self.control.should_save = self.control.should_training_stop = True
            return EvalLoopOutput(None, None, {}, 0)
        metrics["eval_seconds"] = time.perf_counter() - started
        num_rows = sum(map(len, self._evaluation_rows.values()))
        return EvalLoopOutput(None, None, metrics, num_rows)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write one line of metrics and pass it on to the trackers."""
        place = {"step": self.state.global_step, "epoch": self.state.epoch}
        totals = self._start.totals
        if "loss" in logs:
            logs |= self.step.take_metrics()
            logs |= self.clock.measure(self.state.global_step, self.args.device)
            totals.final_loss = logs["loss"]
            self._write(place | logs)
        elif "eval_loss" in logs:
            totals.final_eval_loss = logs["eval_loss"]
            kept = {name: value for name, value in logs.items() if name.startswith(KEPT_METRICS)}
            self._write(place | kept)
        super().log(logs, start_time)

    def _write(self, line: dict[str, Any]) -> None:
        if self._metrics_log is None:
            return
        steps_left = self.state.max_steps - self.state.global_step
        self._metrics_log.write(line, seconds_left=steps_left * self.clock.seconds_a_step)

    # What an interruption left open

    def make_up_evaluation(self, checkpoint: Path) -> None:
        """Evaluate a checkpoint whose evaluation was interrupted, and record it there.

        `RunTotals.owes_evaluation` stays true if it is interrupted once more.
        """
        self._start.totals.owes_evaluation = False
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        # after the last step the run ends by itself, and no evaluation stops it early
        is_last = self.state.global_step >= self._start.total_steps
        self.control.should_training_stop = is_last
        self.evaluate()
        if self._start.totals.owes_evaluation:
            return

        processes = self._request.processes
        if not processes.is_first:
            processes.meet()  # the others are about to read what the first one replaces
            return

        def copy_with_new_totals(directory: Path) -> None:
            for path in checkpoint.iterdir():
                if path.name not in (CHECKSUMS_NAME, PROGRESS_NAME):
                    shutil.copy2(path, directory / path.name)
            progress = read_progress(checkpoint)
            progress["totals"] = vars(self._start.totals)
            atomic_write_json(directory / PROGRESS_NAME, progress)

        write_checkpoint(checkpoint, copy_with_new_totals)
        processes.meet()

    def reopen_window(self) -> None:
        """Restore the sums over the steps since the last line of metrics."""
        if self._start.checkpoint is None:
            return
        window = read_progress(self._start.checkpoint).get("window")
        if window is not None:  # an older version logged every step that it saved
            self._tr_loss.fill_(window["loss"])
            self._globalstep_last_logged = window["logged_step"]
            if self._request.processes.is_first:  # the sums of all processes together
                self.step.restore(window["metrics"])

    # Order of the rows, optimizer, learning rate

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        return EpochSampler(len(train_dataset or self.train_dataset), self._request.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Build the optimizer over the groups of `group_parameters`.

        Raises:
            LlmtuneError: a key of `learning_rates` fits nothing, or the optimizer needs a GPU.
        """
        if OPTIMIZERS[self._config.optimizer].needs_gpu and self.args.device.type == "cpu":
            raise LlmtuneError(
                f"train.optimizer={self._config.optimizer} moves a GPU's memory, and this run is "
                "on the CPU: adamw_8bit keeps the same state without that"
            )
        trained = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        groups = group_parameters(
            list(trained), self.get_decay_parameter_names(self.model), self._config
        )
        make, knobs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = make(
            [
                {
                    "params": [trained[name] for name in group.names],
                    "lr": group.learning_rate,
                    "weight_decay": group.weight_decay,
                }
                for group in groups
            ],
            **knobs,
        )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LambdaLR:
        """Build the schedule of `learning_rate_factor`, which starts above zero."""
        config = self._config
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer,
            lambda step: learning_rate_factor(config, step, num_training_steps),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        target = checkpoint_dir(self._request.run.checkpoints_dir, self.state.global_step)
        if self.state.global_step > self._globalstep_last_logged:
            self.clock.stop(self.state.global_step)  # no line of metrics has counted this time
        with self.clock.aside():
            check_finite(self._request.model, self.state.global_step)
            if self._reduction is not None:
                self._reduction.require_equal(self.state.global_step)
            sums = self.step.open_metrics()
            if not self._request.processes.is_first:
                return
            write_checkpoint(target, lambda directory: self._write_files(directory, sums))
            remove_old_checkpoints(
                target,
                keep=self._config.keep_checkpoints,
                best_step=self._start.totals.best_step,
            )

    def _write_files(self, directory: Path, sums: Mapping[str, OpenSums]) -> None:
        save_weights(self._request.model, directory)
        self._save_optimizer_and_scheduler(str(directory))
        self._save_scaler(str(directory))
        self._save_rng_state(str(directory))
        self.state.save_to_json(str(directory / "trainer_state.json"))
        progress: Progress = {
            "identity": dict(self._start.identity),
            "totals": vars(self._start.totals),
            "choices": dict(self._choices),
            "window": {
                "loss": self._tr_loss.item(),
                "logged_step": self._globalstep_last_logged,
                "metrics": sums,
            },
        }
        atomic_write_json(directory / PROGRESS_NAME, progress)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_weights(self._request.model, Path(resume_from_checkpoint))

    # What the library would do beside

    def _send_telemetry(self) -> None:
        """Send nothing: nothing leaves the machine unasked."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count nothing: tokens are what the metrics report."""
        return 0

    def compute_loss(self, *_args: Any, **_kwargs: Any) -> Tensor:
        """Refuse: the loss is the objective's, in `TrainingStep`."""
        raise AssertionError("trl's loss is not what is trained")


def build_arguments(
    config: TrainConfig, run: RunDir, setup: Setup, *, num_rows: tuple[int, int], seed: int
) -> SFTConfig:
    """Return trl's arguments for a run over `num_rows` (training, evaluation) rows.

    One data-loader item is a whole optimizer step, so there is no accumulation here; precision,
    recomputation, schedule and checkpoints are ours (see `AdapterTrainer`).
    """
    total_steps = config.total_steps(num_rows[0])
    has_evaluation = num_rows[1] > 0
    arguments = SFTConfig(
        output_dir=str(run.checkpoints_dir),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=1,
        max_steps=total_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=OPTIMIZERS[config.optimizer].library_name,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_evaluation else "no",
        # Without eval_every the only evaluation is the one transformers adds at the last step.
        eval_steps=(config.eval_every or total_steps + 1) if has_evaluation else None,
        save_strategy="steps",
        save_steps=config.save_every,
        report_to=list(config.report_to) or "none",
        seed=seed,
        data_seed=seed,
        use_cpu=setup.device.type == "cpu",
        bf16=False,
        fp16=setup.autocast_dtype == torch.float16,
        # None is off for every version, and does not name the deprecated alias.
        gradient_checkpointing=None,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        prediction_loss_only=True,
        router_aux_loss_coef=0.0,
    )
    # One process, one GPU: with several visible ones transformers would split the batch, and the
    # first of them would be its device.
    _ = arguments.device
    arguments._n_gpu = min(arguments._n_gpu, 1)
    arguments.__dict__["_setup_devices"] = setup.device  # where the cached property keeps it
    if setup.device.type == "cuda":
        torch.cuda.set_device(setup.device)
    return arguments


@contextmanager
def restored_model(model: PeftModel) -> Iterator[None]:
    """Give the model back as it came: forward methods, configs, tags and mode, not the weights.

    trl replaces the base model's `forward` on the instance and tags it, accelerate may wrap the
    outer one, and transformers writes `use_cache` and special tokens into the configs.
    """
    base = model.get_base_model()
    holders = (model, base, base.config, base.config.get_text_config())
    attributes = [_copy_attributes(holder) for holder in holders]
    generation_config = copy.deepcopy(base.generation_config)
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for holder, saved in zip(holders, attributes, strict=True):
            holder.__dict__.clear()
            holder.__dict__.update(saved)
        base.generation_config = generation_config
        for module, is_training in modes:
            module.training = is_training
        model.zero_grad(set_to_none=True)


def _copy_attributes(holder: object) -> dict[str, object]:
    """Return an object's attributes; lists are copied, because trl appends to them."""
    return {
        name: list(value) if type(value) is list else value
        for name, value in holder.__dict__.items()
    }


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
