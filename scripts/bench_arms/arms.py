"""The arms: stock trl in its variants, llmtune, and llmtune with one idea left out."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from trl import SFTConfig, SFTTrainer

from bench_arms.base import dequantize_base, load_base, make_tokenizer, set_adapter
from bench_arms.job import ALPHA, RANK, Answer, Job, Times
from bench_arms.reductions import loopback_bytes, timed_reductions
from bench_arms.rows import LONGEST, MEAN_LENGTHS, make_rows, read_stream
from llmtune.data.example import Example
from llmtune.io.processes import join_processes
from llmtune.io.run_dir import RunDir
from llmtune.training.config import TrainConfig
from llmtune.training.memory.measure import peak_bytes
from llmtune.training.request import TrainRequest
from llmtune.training.rows import EpochSampler
from llmtune.training.train import train_adapter

SEED = 0
LEARNING_RATE = 2e-4
# Moves no float32 weight: every step's gradients are those of the same adapter.
FIXED_LEARNING_RATE = 1e-30
# Never clips, but costs what clipping costs: gradients stay comparable across arms.
LARGE_NORM = 1e9

# What each stock arm changes about trl's arguments, and the dtype its base is loaded in.
# "trl-default" is what trl does if nothing is said: float32, recomputation, padding.
BEST = {"gradient_checkpointing": False, "optim": "adamw_torch_fused"}
# Rows of a forward pass; a step accumulates. On a CPU faster than a whole step's rows at once.
SMALL = BEST | {"per_device_train_batch_size": 2}
STOCK: dict[str, tuple[torch.dtype, dict]] = {
    "reference": (torch.float32, SMALL | {"bf16": False}),
    "trl-default": (torch.float32, {}),
    "trl-padded": (torch.bfloat16, BEST),
    "trl-small": (torch.bfloat16, SMALL),
    "trl-grouped": (torch.bfloat16, SMALL | {"train_sampling_strategy": "group_by_length"}),
    "trl-packed": (torch.bfloat16, BEST | {"packing": True, "per_device_train_batch_size": 1}),
    "trl-padding-free": (torch.bfloat16, SMALL | {"padding_free": True, "max_length": None}),
}
# What "trl-best" is: measured as the fastest of the above; `--all` measures them all again.
BEST_STOCK = {"cpu": "trl-packed", "cuda": "trl-packed"}
OURS: dict[str, dict] = {
    "llmtune": {},
    "llmtune-stock-lora": {"without": frozenset({"fused_lora"})},
    "llmtune-stock-blocks": {"without": frozenset({"fused_blocks"})},
    "llmtune-stock-head": {"without": frozenset({"frozen_head"})},
    "llmtune-padded": {"packing": "off"},
    "llmtune-whole-rows": {"without": frozenset({"shared_beginnings"})},
}


def run_job(job: Job, answer_file: Path) -> None:
    """Run one arm in this process and write what was measured."""
    run = _run_ours if job.arm in OURS else _run_stock
    is_first = os.environ.get("RANK", "0") == "0"
    answer = run(job)
    if is_first:
        answer.write(answer_file)


def _run_stock(job: Job) -> Answer:
    name = BEST_STOCK[job.device] if job.arm == "trl-best" else job.arm
    dtype, changes = STOCK[name]
    model = load_base(job, dtype=dtype)
    if job.arm == "reference" and job.quantization != "none":
        dequantize_base(model)
    base_bytes = _used_bytes(job.device)
    rows = _make_rows(job)
    # The order in which llmtune takes the rows.
    rows = [rows[index] for index in EpochSampler(len(rows), SEED)]
    dataset = Dataset.from_dict(
        {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}
    )
    with TemporaryDirectory() as directory:
        trainer = SFTTrainer(
            model=get_peft_model(model, _lora_config()),
            args=_stock_arguments(job, changes, directory),
            train_dataset=dataset,
            processing_class=make_tokenizer(),
        )
        set_adapter(trainer.model)
        batch_tokens = _count_tokens(trainer)
        with _watched_steps(job, trainer.model) as times:
            trainer.train()
    return Answer(
        times=times,
        step_tokens=_sum_runs(
            batch_tokens, trainer.args.gradient_accumulation_steps, len(times.seconds)
        ),
        losses=[line["loss"] for line in trainer.state.log_history if "loss" in line],
        base_bytes=base_bytes,
        peak_bytes=peak_bytes(torch.device(job.device)),
        choices={"arm": name},
    )


def _stock_arguments(job: Job, changes: dict, directory: str) -> SFTConfig:
    rows = job.batch_size
    if "packing" in changes:  # as many tokens a step as the rows have on average
        rows = max(1, round(rows * MEAN_LENGTHS.get(job.mix, job.full_length) / LONGEST))
    rows //= int(os.environ.get("WORLD_SIZE", "1"))
    at_once = min(changes.get("per_device_train_batch_size", rows), rows)
    options = {
        "output_dir": directory,
        "max_steps": job.warm_up + job.steps,
        "learning_rate": _learning_rate(job),
        "lr_scheduler_type": "constant",
        "max_grad_norm": LARGE_NORM,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": job.device == "cpu",
        "seed": SEED,
        "train_sampling_strategy": "sequential",
        "max_length": max(LONGEST, job.full_length),
    }
    if "WORLD_SIZE" in os.environ:
        options["ddp_backend"] = "gloo" if job.device == "cpu" else "nccl"
        options["ddp_find_unused_parameters"] = False
    fixed = {
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": rows // at_once,
    }
    return SFTConfig(**(options | changes | fixed))


def _run_ours(job: Job) -> Answer:
    processes = join_processes()
    model = load_base(job, dtype=torch.bfloat16)
    base_bytes = _used_bytes(job.device)
    rows = _make_rows(job)
    adapted = get_peft_model(model, _lora_config())
    set_adapter(adapted)
    config = TrainConfig(
        learning_rate=_learning_rate(job),
        schedule="constant",
        warmup_ratio=0.0,
        batch_size=job.batch_size,
        max_grad_norm=LARGE_NORM,
        max_steps=job.warm_up + job.steps,
        save_every=job.warm_up + job.steps,
    )
    with TemporaryDirectory() as directory:
        run = RunDir(Path(directory))
        request = TrainRequest(
            model=adapted,
            tokenizer=make_tokenizer(),
            train=[Example(ids, labels, job.mix, 1) for ids, labels in rows],
            evaluation=[],
            run=run,
            seed=SEED,
            identity={},
            quiet=True,
            processes=processes,
            **OURS[job.arm],
        )
        watched, reducing = _watched_steps(job, adapted), timed_reductions()
        with watched as times, reducing as reductions:
            result = train_adapter(config, request)
        if not processes.is_first:
            return Answer(times, [], [], base_bytes, result.peak_bytes)
        lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    totals = [0, *(line["tokens"] for line in lines)]
    return Answer(
        times=times,
        step_tokens=[after - before for before, after in pairwise(totals)],
        losses=[line["loss"] for line in lines],
        base_bytes=base_bytes,
        peak_bytes=result.peak_bytes,
        choices=result.choices,
        reductions=reductions,
    )


def _make_rows(job: Job) -> list[tuple[list[int], list[int]]]:
    stream = read_stream(Path(job.model_dir))
    return make_rows(job.mix, job.num_rows, full_length=job.full_length, stream=stream)


def _learning_rate(job: Job) -> float:
    return LEARNING_RATE if job.gradients_file is None else FIXED_LEARNING_RATE


def _lora_config() -> LoraConfig:
    return LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _count_tokens(trainer: SFTTrainer) -> list[int]:
    """Note the tokens of every batch, without padding; the rows never hold the padding's id."""
    collate: Callable[[list], dict] = trainer.data_collator
    counts: list[int] = []

    def counting(rows: list) -> dict:
        batch = collate(rows)
        counts.append(int((batch["input_ids"] != trainer.processing_class.pad_token_id).sum()))
        return batch

    trainer.data_collator = counting
    return counts


def _sum_runs(values: list[int], length: int, count: int) -> list[int]:
    """Sum `count` runs of `length` values; batches that were only fetched ahead are left over."""
    return [sum(values[length * one : length * (one + 1)]) for one in range(count)]


@contextmanager
def _watched_steps(job: Job, model: PeftModel) -> Iterator[Times]:
    """Time the steps, from one optimizer step to the next; keep and save their gradients if asked.

    The same clock for every arm; what a step logs is in its time. The first has the start-up in it.
    """
    times = Times()
    gradients: dict[str, Tensor] = {}
    started, processed, sent = time.perf_counter(), time.process_time(), loopback_bytes()

    def keep_gradients(*_: object) -> None:
        if job.gradients_file is not None:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients[f"{len(times.seconds)} {name}"] = parameter.grad.float().cpu().clone()

    def note_time(*_: object) -> None:
        nonlocal started, processed, sent
        if job.device == "cuda":
            torch.cuda.synchronize()
        now, now_processed, now_sent = time.perf_counter(), time.process_time(), loopback_bytes()
        times.seconds.append(now - started)
        times.processor_seconds.append(now_processed - processed)
        times.moved_bytes.append(now_sent - sent)
        started, processed, sent = now, now_processed, now_sent

    hooks = (
        register_optimizer_step_pre_hook(keep_gradients),
        register_optimizer_step_post_hook(note_time),
    )
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()
    if job.gradients_file is not None:
        save_file(gradients, job.gradients_file)


def _used_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss
