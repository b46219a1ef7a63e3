"""The merge stage: the run's adapter added into its base, checked against the live adapter."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmtune.config import RunConfig
from llmtune.io.manifest import Manifest, StageRecord
from llmtune.merging.config import NO_SETTINGS, MergeConfig, MergeSettings
from llmtune.runs.stage import Stage


class MergeStage(Stage):
    """Add the run's adapter into its base, in `merged/`."""

    name = "merge"

    def __init__(
        self, config: RunConfig, *, force: bool = False, settings: MergeSettings = NO_SETTINGS
    ) -> None:
        super().__init__(config, force=force)
        self.settings = settings

    def check(self) -> None:
        """Require an adapter."""
        self.adapter  # noqa: B018 (raises without one)

    def inputs(self, manifest: Manifest) -> dict[str, Any]:
        """Return the hashes of adapter and base, and the knobs."""
        inputs = {
            "adapter": self.adapter,
            "base": self.source.fingerprint,
            "merge": self.config.merge.model_dump(mode="json"),
        }
        return inputs | ({"dtype": self.settings.dtype} if self.settings.dtype else {})

    def complete(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return recorded inputs with the knobs that came later, as defaults."""
        try:
            knobs = MergeConfig(**inputs["merge"]).model_dump(mode="json")
        except (KeyError, TypeError, ValidationError):
            return inputs  # of a version whose knobs are no longer there: other inputs
        return {**inputs, "merge": knobs}

    def outputs(self, record: StageRecord) -> Iterator[Path]:
        """Yield the merged model's directory."""
        yield self.config.run.merged_dir

    def run(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Merge and check."""
        from llmtune.merging.one_adapter import merge_one
        from llmtune.runs.merge_apart import request_of_run

        config = self.config
        request = request_of_run(config, config.run.merged_dir, self.settings)
        return merge_one(request).to_dict()
