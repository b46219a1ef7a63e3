"""The train stage: load and quantize, inject, fit, save the adapter with what it stands on."""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtune.adapters.inject import inject_adapter
from llmtune.adapters.saved import save_adapter
from llmtune.config import RunConfig
from llmtune.data.prepare import PreparedData
from llmtune.data.template import template_fingerprint
from llmtune.io.environment import versions
from llmtune.io.fingerprint import hash_json
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.hardware import choose_device
from llmtune.models.load import LoadedModel, load_model
from llmtune.stages.describe import describe_injected, describe_loaded
from llmtune.stages.estimate import estimate_training
from llmtune.training.protect.prepare import prepare_protection
from llmtune.training.request import TrainRequest
from llmtune.training.rows import hash_epochs
from llmtune.training.stop_check import check_stops
from llmtune.training.train import train_adapter

log = logging.getLogger("llmtune")


@dataclass(frozen=True)
class TrainInputs:
    """What training stands on, checked before the base is loaded."""

    source: Checkpoint
    train: PreparedData
    evaluation: PreparedData
    identity: Mapping[str, str]
    """Hashes of base, data and config: in every checkpoint, and compared on resume."""
    general: PreparedData | None = None
    """Rows of `protect.kl_to_base.source`, where it is a file."""


def run_train_stage(config: RunConfig, inputs: TrainInputs) -> dict[str, Any]:
    """Train and save the adapter in `run_dir/adapter`; return the result as JSON values."""
    device = choose_device(config.model.device)
    estimate = estimate_training(
        config, inputs.source.directory, device, (inputs.train, inputs.evaluation)
    )
    loaded = load_model(config.model, inputs.source)
    log_lines(describe_loaded(loaded))
    protection = prepare_protection(
        config.protect,
        loaded,
        num_rows=len(inputs.train.examples),
        general=None if inputs.general is None else inputs.general.examples,
        seed=config.seed,
        own_text_path=config.run.own_text_path,
    )
    torch.manual_seed(config.seed)
    injected = inject_adapter(loaded.model, config.adapter, base_fingerprint=loaded.fingerprint)
    log_lines(describe_injected(injected.table))
    result = train_adapter(
        config.train,
        TrainRequest(
            model=injected.model,
            tokenizer=loaded.tokenizer,
            train=protection.join(inputs.train.examples),
            evaluation=inputs.evaluation.examples,
            run=config.run,
            seed=config.seed,
            identity=inputs.identity,
            packing=config.data.packing,
            quiet=not log.isEnabledFor(logging.INFO),
            protection=protection.request,
        ),
    )
    save_adapter(
        injected.model,
        config.run.adapter_dir,
        _adapter_manifest(config, inputs, loaded),
        tokenizer=loaded.tokenizer,
    )
    return {
        **dataclasses.asdict(result),
        "estimate": estimate,
        "stop_check": check_stops(
            injected.model,
            loaded.tokenizer,
            inputs.evaluation.examples
            if len(inputs.evaluation.examples)
            else inputs.train.examples,
            loaded.stop_token_ids,
        ),
        "order_hash": _order_hash(config, inputs, result.steps, len(protection.replay)),
        "protect": protection.describe(),
        "adapter_bytes": _directory_bytes(config.run.adapter_dir),
        "injection": injected.table.to_dict(),
        "quantization": dataclasses.asdict(loaded.quantized),
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attention": loaded.attention,
    }


def log_lines(lines: Iterable[str]) -> None:
    """Send lines to the log."""
    for line in lines:
        log.info("%s", line)


def _adapter_manifest(
    config: RunConfig, inputs: TrainInputs, loaded: LoadedModel
) -> dict[str, Any]:
    return {
        "base": {
            **inputs.source.as_dict(),
            "fingerprint": loaded.fingerprint,
        },
        "template": template_fingerprint(loaded.tokenizer).to_json(),
        "data_fingerprint": inputs.train.fingerprint,
        "stop_token_ids": list(loaded.stop_token_ids),
        "versions": versions(),
        "config": config.model_dump(mode="json"),
    }


def _order_hash(config: RunConfig, inputs: TrainInputs, steps: int, num_replay: int) -> str:
    """Hash which rows were seen in which order: a function of the data and the seed alone."""
    num_rows = len(inputs.train.examples) + num_replay
    num_epochs = math.ceil(steps / math.ceil(num_rows / config.train.batch_size))
    epochs = hash_epochs(num_rows, config.seed, num_epochs)
    return hash_json({"mixture": inputs.train.order_hash, "epochs": epochs})


def _directory_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
