"""Which knobs of a config decide its adapter, also of a config that an older version recorded.

A recorded config lacks the keys that were added since. Such a key counts as its default, so that an
older run can still be evaluated and reported.
"""

from collections.abc import Mapping
from typing import Any

from llmtune.config import RunConfig
from llmtune.data.config import SourceConfig
from llmtune.io.validation import validate_section
from llmtune.io.yaml_source import SourcedTree


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


def deciding_knobs_of(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `deciding_knobs` does, of a config as a manifest holds it.

    Raises:
        LlmtuneError: it has a key that this version does not know.
    """
    tree = SourcedTree(dict(recorded), {(): "the run's manifest.json"})
    return deciding_knobs(validate_section(RunConfig, tree))
