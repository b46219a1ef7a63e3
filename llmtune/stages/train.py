"""The train stage: load and quantize, inject, fit, save the adapter with what it stands on."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtune.adapters.inject import inject_adapter
from llmtune.adapters.saved import save_adapter
from llmtune.config import RunConfig
from llmtune.data.prepare import PreparedData
from llmtune.data.template import template_fingerprint
from llmtune.environment import versions
from llmtune.models.load import LoadedModel, load_model
from llmtune.models.resolve import BaseSource
from llmtune.training.sft import TrainRequest, train_adapter

log = logging.getLogger("llmtune")


@dataclass(frozen=True)
class TrainInputs:
    """What training stands on, checked before the base is loaded."""

    source: BaseSource
    train: PreparedData
    evaluation: PreparedData
    identity: Mapping[str, str]
    """Hashes of base, data and config: in every checkpoint, and compared on resume."""


def run_train_stage(config: RunConfig, inputs: TrainInputs) -> dict[str, Any]:
    """Train and save the adapter in `run_dir/adapter`; return the result as JSON values."""
    loaded = load_model(config.model, inputs.source)
    log_loaded(loaded)
    injected = inject_adapter(
        loaded.model, config.adapter, base_fingerprint=loaded.fingerprint, seed=config.seed
    )
    for line in injected.table.lines():
        log.info("%s", line)
    result = train_adapter(
        config.train,
        TrainRequest(
            model=injected.model,
            tokenizer=loaded.tokenizer,
            train=inputs.train.examples,
            evaluation=inputs.evaluation.examples,
            run=config.run,
            seed=config.seed,
            identity=inputs.identity,
            packing=config.data.packing,
        ),
    )
    save_adapter(injected.model, config.run.adapter_dir, _adapter_manifest(config, inputs, loaded))
    return {
        **dataclasses.asdict(result),
        "adapter_bytes": _directory_bytes(config.run.adapter_dir),
        "injection": dataclasses.asdict(injected.table),
        "quantization": dataclasses.asdict(loaded.quantized),
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attention": loaded.attention,
    }


def log_loaded(loaded: LoadedModel) -> None:
    """Say what was loaded: device, precision, attention, what was quantized and what not."""
    log.info(
        "base %s on %s, %s, attention %s",
        loaded.source.origin,
        loaded.device,
        str(loaded.dtype).removeprefix("torch."),
        loaded.attention,
    )
    for line in (*loaded.quantized.lines(), *loaded.notices):
        log.info("%s", line)


def _adapter_manifest(
    config: RunConfig, inputs: TrainInputs, loaded: LoadedModel
) -> dict[str, Any]:
    return {
        "base": {
            "fingerprint": loaded.fingerprint,
            "origin": inputs.source.origin,
            "revision": inputs.source.revision,
            "path": str(inputs.source.dir),
            "gguf_sha256": inputs.source.gguf_sha256,
        },
        "template": template_fingerprint(loaded.tokenizer).to_json(),
        "data_fingerprint": inputs.train.fingerprint,
        "stop_token_ids": list(loaded.stop_token_ids),
        "versions": versions(),
        "config": config.model_dump(mode="json"),
    }


def _directory_bytes(directory: Any) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
