"""The merge stage: the run's adapter added into its base, checked against the live adapter."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llmtune.config import RunConfig
from llmtune.evaluation.suite import load_suites
from llmtune.io.fingerprint import JsonObject, JsonValue
from llmtune.io.manifest import Manifest, MergeRecord, StageRecord
from llmtune.merging.config import NO_SETTINGS, MergeConfig, MergeSettings
from llmtune.models.checkpoint import Checkpoint
from llmtune.runs.stage import Stage

if TYPE_CHECKING:
    from llmtune.merging.one_adapter import MergeRequest
    from llmtune.merging.planned import PlannedMerges


class MergeStage(Stage[MergeRecord]):
    """Add the run's adapter into its base, in `merged/`."""

    name = "merge"
    paths_in_run = ("out_dir",)

    def __init__(
        self,
        config: RunConfig,
        *,
        force: bool = False,
        opened: Checkpoint | None = None,
        settings: MergeSettings = NO_SETTINGS,
    ) -> None:
        super().__init__(config, force=force, opened=opened)
        self.settings = settings

    def check(self) -> None:
        """Require an adapter."""
        self.adapter  # noqa: B018 (raises without one)

    def plan_before_training(self) -> "PlannedMerges | None":
        """Plan the merge of the adapter that training would make, so that it cannot fail for long.

        Raises:
            MergeRefused: that adapter could not be merged.
        """
        from llmtune.merging.one_adapter import MergeRequest
        from llmtune.merging.untrained import plan_untrained

        config, run = self.config, self.config.run
        request = MergeRequest(
            config.model,
            self.source,
            run.adapter_dir,
            run.merged_dir,
            config.merge,
            settings=self.settings,
        )
        return plan_untrained(request, config.adapter)

    def inputs(self, manifest: Manifest) -> JsonObject:
        """Return the hashes of adapter and base, and the knobs."""
        inputs = {**self._inputs_in_run(), "base": self.source.fingerprint}
        return inputs | ({"dtype": self.settings.dtype} if self.settings.dtype else {})

    def _inputs_in_run(self) -> dict[str, JsonValue]:
        return {"adapter": self.adapter, "merge": self.config.merge.model_dump(mode="json")}

    def why_unusable(self, manifest: Manifest, *, with_base: bool = True) -> str | None:
        """Say why the merged model may not be used, and what to do; None if it may.

        It may if the merge is finished on the adapter, the knobs and the base of now; without
        `with_base` the base is not looked for. In which dtype it was written is left open.
        """
        run = self.config.run
        if not run.merged_dir.is_dir():
            return f"{run.path}: has no merged model; make it with: llmtune merge {run.path}"
        present = self._inputs_in_run()
        if with_base:
            present["base"] = self.source.fingerprint
        return self.why_unfinished(manifest, present)

    def complete(self, inputs: Mapping[str, Any]) -> JsonObject:
        """Return recorded inputs with the knobs that came later, as defaults."""
        try:
            knobs = MergeConfig(**inputs["merge"]).model_dump(mode="json")
        except (KeyError, TypeError, ValidationError):
            return inputs  # of a version whose knobs are no longer there: other inputs
        return {**inputs, "merge": knobs}

    def outputs(self, record: StageRecord) -> Iterator[Path]:
        """Yield the merged model's directory."""
        yield self.config.run.merged_dir

    def run(self, inputs: JsonObject) -> MergeRecord:
        """Merge and check."""
        from llmtune.merging.one_adapter import merge_one

        out_dir = self.config.run.merged_dir
        return merge_one(
            request_of_run(self.config, self.source, out_dir, self.settings)
        ).to_record()


def request_of_run(
    config: RunConfig, source: Checkpoint, out_dir: Path, settings: MergeSettings
) -> "MergeRequest":
    """Return a merge of a run's adapter, checked on its held-out rows and its suites.

    A base that is sharded to train need not fit on a card, so it is compared on the CPU.
    """
    from llmtune.checks.prompts import HeldOut
    from llmtune.merging.one_adapter import MergeRequest

    is_sharded = config.train.shard == "full"
    return MergeRequest(
        model=config.model.model_copy(update={"device": "cpu"}) if is_sharded else config.model,
        source=source,
        adapter_dir=config.run.adapter_dir,
        out_dir=out_dir,
        knobs=config.merge,
        held_out=HeldOut(config.data, config.seed, tuple(load_suites(config.evaluate))),
        settings=settings,
    )
