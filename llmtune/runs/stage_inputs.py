"""What decides the result of each stage, so that a finished one is known again.

What was recorded by an older version lacks the keys that the config has got since. Such a key
counts as its default, so that an older run can still be evaluated and reported.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.config import RunConfig
from llmtune.data.config import SourceConfig
from llmtune.data.prepare import PreparedData
from llmtune.evaluation.config import EvaluateConfig
from llmtune.io.fingerprint import hash_json
from llmtune.io.validation import validate_section
from llmtune.io.yaml_source import SourcedTree
from llmtune.merging.config import MergeConfig
from llmtune.models.identity import base_fingerprint


def train_inputs(
    config: RunConfig, base_dir: Path, data: Mapping[str, PreparedData]
) -> dict[str, str]:
    """Return the hashes of what decides the adapter: base, rows and order, and the knobs."""
    inputs = {
        "base": base_fingerprint(base_dir),
        "data": hash_json({name: prepared.fingerprint for name, prepared in data.items()}),
        "config": hash_json(deciding_knobs(config)),
    }
    if config.adapter.init_from is not None:
        inputs["start"] = adapter_fingerprint(config.adapter.init_from)
    return inputs


def take_config_hash(inputs: dict[str, str], record: Mapping[str, Any]) -> dict[str, str]:
    """Return the inputs of training with the recorded hash of the knobs, where there is one.

    The ledger has held the knobs themselves against the recorded ones, key by key; a hash of fewer
    keys differs although they are the same.
    """
    known = (record.get("inputs") or {}).get("config")
    return inputs if known is None else {**inputs, "config": known}


def complete_inputs(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return recorded inputs of merge or evaluate with the knobs that came later, as defaults."""
    try:
        completed = dict(inputs)
        if "merge" in inputs and isinstance(inputs["merge"], Mapping):
            completed["merge"] = MergeConfig(**inputs["merge"]).model_dump(mode="json")
        if "evaluate" in inputs:
            completed["evaluate"] = EvaluateConfig(**inputs["evaluate"]).measuring_knobs()
    except (TypeError, ValidationError):
        return inputs  # of a version whose knobs are no longer there: other inputs
    return completed


def deciding_knobs_of(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `deciding_knobs` does of a config as a manifest holds it.

    Raises:
        LlmtuneError: it has a key that this version does not know.
    """
    tree = SourcedTree(dict(recorded), {(): "the run's manifest.json"})
    return deciding_knobs(validate_section(RunConfig, tree))


def deciding_knobs(config: RunConfig) -> dict[str, Any]:
    """Return the knobs that decide the adapter; base and rows are compared by their content."""
    values = config.model_dump(
        mode="json",
        include={"seed", "model", "adapter", "data", "protect"},
        exclude={
            "protect": {
                part: {"source": {"path", "revision"}}
                for part in ("replay", "kl_to_base")
                if isinstance(getattr(getattr(config.protect, part), "source", None), SourceConfig)
            },
            "model": {"base", "revision", "trust_remote_code", "cache_quantized"},
            "data": {
                "cache": True,
                "train": {"__all__": {"path", "revision"}},
                "evaluation": {"__all__": {"path", "revision"}},
            },
        },
    )
    return values | {"train": config.train.deciding_knobs()}
