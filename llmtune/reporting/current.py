"""Which results on disk are of the run as it stands, and which an earlier evaluation left."""

from collections.abc import Callable
from dataclasses import dataclass

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.errors import LlmtuneError
from llmtune.evaluation.compare import arm_kind
from llmtune.evaluation.harness import HARNESS_TASK
from llmtune.evaluation.results import ArmResult
from llmtune.io.manifest import Manifest
from llmtune.io.run_dir import RunDir
from llmtune.models.checkpoint import Checkpoint

MAIN_KINDS = ("base", "tuned", "merged")


@dataclass(frozen=True)
class Models:
    """Fingerprints of the models that a run's directory holds; None where there is none."""

    base: str | None
    adapter: str | None

    @classmethod
    def of_run(cls, run: RunDir, manifest: Manifest) -> "Models":
        """Read the base from the manifest and the adapter from its files."""
        try:
            adapter = adapter_fingerprint(run.adapter_dir)
        except LlmtuneError:
            adapter = None  # not trained yet, or taken away: then nothing is of it
        return cls(manifest.base.get("fingerprint"), adapter)


def is_finished(manifest: Manifest, stage: str) -> bool:
    """Return whether a stage ended well and none before it was begun again since."""
    return bool(manifest.stages.get(stage, {}).get("finished"))


def current_results(run: RunDir, manifest: Manifest, models: Models) -> Callable[[ArmResult], bool]:
    """Return what tells a result of the run as it stands from one that was left behind.

    After a finished evaluation these are the arms and suites that it made. Without one they are
    those of the very models on disk: base and tuned of the manifest's base, tuned with the saved
    adapter, merged with the saved weights. Arms beside those three may have been measured later;
    they count where they are of the models on disk, on a suite that was evaluated.
    """
    is_of_models = _models_on_disk(run, models)
    if not is_finished(manifest, "evaluate"):
        return is_of_models
    made = (manifest.stages["evaluate"].get("result") or {}).get("suites", {})

    def is_current(result: ArmResult) -> bool:
        arms = made.get(result.suite, {})
        if result.arm in arms:
            return True
        if arm_kind(result.arm) in {arm_kind(arm) for arm in arms}:
            return False  # of an earlier call with other knobs: a draw or a strength too many
        # Tasks of lm-evaluation-harness and further arms are run beside the stage.
        is_beside = result.task == HARNESS_TASK or arm_kind(result.arm) not in MAIN_KINDS
        is_of_suite = result.task == HARNESS_TASK or result.suite in made
        return is_beside and is_of_suite and is_of_models(result)

    return is_current


def _models_on_disk(run: RunDir, models: Models) -> Callable[[ArmResult], bool]:
    is_merged = any(run.merged_dir.glob("*.safetensors"))
    merged = Checkpoint.open(run.merged_dir).fingerprint if is_merged else None
    bare, tuned = (models.base, None), (models.base, models.adapter)
    identities = {
        "base": bare if models.base else None,
        "few-shot": bare if models.base else None,
        "prompt": bare if models.base else None,
        "probe": bare if models.base else None,
        "tuned": tuned if models.adapter else None,
        "strength": tuned if models.adapter else None,
        "merged": (merged, None) if merged else None,
    }

    def is_of_models(result: ArmResult) -> bool:
        kind = arm_kind(result.arm)
        if kind == "other":
            return True  # another model's answers do not depend on what lies here
        identity = (result.model.get("base"), result.model.get("adapter"))
        return identity == identities.get(kind)

    return is_of_models
