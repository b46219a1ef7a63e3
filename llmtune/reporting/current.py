"""Which results on disk are of the run as it stands, and which an earlier evaluation left."""

from collections.abc import Callable

from llmtune.adapters.manifest import adapter_fingerprint
from llmtune.errors import LlmtuneError
from llmtune.evaluation.harness import HARNESS_TASK
from llmtune.evaluation.results import ArmResult
from llmtune.manifest import Manifest
from llmtune.models.identity import base_fingerprint
from llmtune.run_dir import RunDir


def is_finished(manifest: Manifest, stage: str) -> bool:
    """Return whether a stage ended well and none before it was begun again since."""
    return bool(manifest.stages.get(stage, {}).get("finished"))


def current_results(run: RunDir, manifest: Manifest) -> Callable[[ArmResult], bool]:
    """Return what tells a result of the run as it stands from one that was left behind.

    After a finished evaluation these are the arms and suites that it made. Without one they are
    those of the very models on disk: base and tuned of the manifest's base, tuned with the saved
    adapter, merged with the saved weights.
    """
    is_of_models_on_disk = _matches_models_on_disk(run, manifest)
    if not is_finished(manifest, "evaluate"):
        return is_of_models_on_disk
    made = manifest.stages["evaluate"].get("result") or {}

    def is_current(result: ArmResult) -> bool:
        # Tasks of lm-evaluation-harness are run beside the stage, whenever the user asks.
        if result.task == HARNESS_TASK:
            return is_of_models_on_disk(result)
        return result.arm in made.get(result.suite, ())

    return is_current


def _matches_models_on_disk(run: RunDir, manifest: Manifest) -> Callable[[ArmResult], bool]:
    base = manifest.base.get("fingerprint")
    try:
        adapter = adapter_fingerprint(run.adapter_dir)
    except LlmtuneError:
        adapter = None  # not trained yet, or taken away: then nothing is of it
    merged = base_fingerprint(run.merged_dir) if any(run.merged_dir.glob("*.safetensors")) else None
    models = {"base": (base, None), "tuned": (base, adapter), "merged": (merged, None)}
    gone = {"tuned": adapter is None, "merged": merged is None, "base": base is None}

    def is_of_models_on_disk(result: ArmResult) -> bool:
        identity = (result.model.get("base"), result.model.get("adapter"))
        return not gone.get(result.arm, True) and identity == models[result.arm]

    return is_of_models_on_disk
