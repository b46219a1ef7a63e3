"""What a path on the command line names: a config, a run, an adapter, or a whole model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from llmtune.adapters.manifest import (
    MANIFEST_NAME,
    read_adapter_config,
    read_adapter_manifest,
)
from llmtune.config import (
    EffectiveKey,
    RunConfig,
    effective_keys,
    load_config,
    read_config_tree,
)
from llmtune.data.config import SourceConfig
from llmtune.errors import LlmtuneError
from llmtune.evaluation.config import EvaluateConfig
from llmtune.exporting.base import ExportSource
from llmtune.io.manifest import Manifest, is_judgment, read_manifest
from llmtune.io.run_dir import RunDir
from llmtune.io.validation import lay_overrides, validate_section
from llmtune.io.yaml_source import SourcedTree, apply_overrides
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.resolve import Loadable
from llmtune.reporting.sections.sequence import read_sequence
from llmtune.runs.merge import MergeStage
from llmtune.schema import Section

TEMPLATE_NAME = "chat_template.jinja"
YAML_SUFFIXES = (".yaml", ".yml")
Wide = TypeVar("Wide", bound=Loadable)

RUN_NAMES = "a run directory, or a config (a .yaml file)"


class BaseKeys(TypedDict, total=False):
    """The keys of a `model` section that an adapter says of its base."""

    base: str | None
    revision: str | None
    quantization: Mapping[str, Any] | None
    chat_template: str


class ModelOnly(Section):
    """The keys that can be overridden if the target is an adapter or a model."""

    model: ModelConfig


@dataclass(frozen=True)
class Target(Loadable):
    """What a path names, to be loaded, with the run's config if it is a run."""

    config: RunConfig | None = None

    def widen(self, kind: type[Wide], **more: Any) -> Wide:
        """Return what is to be loaded as a `Loadable` of a kind that has `more` fields."""
        return kind(**{one.name: getattr(self, one.name) for one in fields(Loadable)}, **more)

    @property
    def evaluate(self) -> EvaluateConfig:
        """How it is scored: as the run's config says."""
        return self.config.evaluate if self.config else EvaluateConfig()

    @property
    def trained_rows(self) -> SourceConfig | None:
        """How a run's training rows are read; None if they are of several sources."""
        sources = (
            [each for each in self.config.data.train if not each.replay] if self.config else []
        )
        return sources[0] if len(sources) == 1 else None

    @property
    def results_dir(self) -> Path | None:
        """Where a run keeps its results; None for anything else."""
        if self.config is None or not self.config.run.manifest_path.is_file():
            return None
        return self.config.run.evaluations_dir


def resolve_target(name: str, overrides: Sequence[str] = ()) -> Target:
    """Say what `name` is: a YAML config, a run, an adapter directory, a checkpoint or a hub id.

    Raises:
        LlmtuneError: it is none of these, or an override does not fit it.
    """
    path = Path(name)
    if path.suffix in YAML_SUFFIXES:
        return run_target(name, load_config(path, overrides))
    if (path / "manifest.json").is_file():
        manifest = read_manifest(RunDir(path))
        if is_judgment(manifest.config):
            return _judged_target(name, manifest, overrides)
        return run_target(name, load_run_config(path, overrides))
    if (path / "adapter_config.json").is_file():
        return Target(
            name,
            _model(adapter_base(path), overrides),
            adapter_dir=path,
            keeps_quantized=not (path / MANIFEST_NAME).is_file(),
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise LlmtuneError(
            f"{name}: neither a run (manifest.json), nor an adapter (adapter_config.json), "
            "nor a model (config.json); give the path of one, or copy back the file that it lost"
        )
    return Target(name, _model({"base": name}, overrides))


def export_source(target: Target) -> ExportSource:
    """Return what an export of a target is made from."""
    run_dir = target.config.run_dir if target.config else None
    return target.widen(ExportSource, run_dir=run_dir)


def require_run(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config of the run that `name` is: its directory or its YAML file.

    Raises:
        LlmtuneError: it is something else.
    """
    _require_path(name)
    path = Path(name)
    if path.suffix in YAML_SUFFIXES:
        return load_config(path, overrides)
    if (path / "manifest.json").is_file():
        return load_run_config(path, overrides)
    resolve_target(name, overrides)  # may say what it has lost
    raise LlmtuneError(f"{name}: not a run; expected {RUN_NAMES}")


def read_effective_keys(name: str, overrides: Sequence[str] = ()) -> list[EffectiveKey]:
    """Return every key of a run directory's config or of a YAML file, and where it is from.

    Raises:
        LlmtuneError: there is no such path, or its config is wrong.
    """
    _require_path(name)
    path = Path(name)
    is_run = path.is_dir()
    tree = _recorded_tree(path, overrides) if is_run else read_config_tree(path, overrides)
    return effective_keys(validate_section(RunConfig, tree), tree)


def find_run_dir(name: str) -> Path:
    """Return the directory of the run that `name` is: the directory itself, or its config's.

    What `llmtune sequence` left is named by its last run, which has learned all tasks.
    """
    _require_path(name)
    path = Path(name)
    if path.suffix in YAML_SUFFIXES:
        return load_config(path).run_dir
    if not path.is_dir():
        raise LlmtuneError(f"{name}: not a run; expected {RUN_NAMES}")
    sequence = None if RunDir(path).manifest_path.exists() else read_sequence(path)
    return path / sequence.runs[-1] if sequence else path


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config a run was made with; `run_dir` is where the run is now."""
    return validate_section(RunConfig, _recorded_tree(run_dir, overrides))


def _recorded_tree(run_dir: Path, overrides: Sequence[str]) -> SourcedTree:
    run = RunDir(run_dir)
    recorded = {**read_manifest(run).config, "run_dir": str(run_dir)}
    if is_judgment(recorded):
        raise LlmtuneError(
            f"{run_dir}: holds a judgment and no run; continue it with: llmtune judge {run_dir}"
        )
    tree = SourcedTree(recorded, {(): str(run.manifest_path)})
    return lay_overrides(RunConfig, tree, overrides)


def _require_path(name: str) -> None:
    if not Path(name).exists():
        raise LlmtuneError(f"{name}: no such file or directory; expected {RUN_NAMES}")


def adapter_base(adapter_dir: Path) -> BaseKeys:
    """Return the `model` section for an adapter's base, as the adapter recorded it.

    The chat template saved beside the adapter is the one it was trained with, and the base is
    quantized as it was in training.

    Raises:
        LlmtuneError: the adapter cannot be read, or names no base.
    """
    config = read_adapter_config(adapter_dir)
    model: BaseKeys
    if (adapter_dir / MANIFEST_NAME).is_file():
        model = _recorded_base(adapter_dir)
    else:
        model = {"base": config.get("base_model_name_or_path"), "revision": config.get("revision")}
        if not model["base"]:
            raise LlmtuneError(
                f"{adapter_dir}: adapter_config.json names no base model; give it: model.base=PATH"
            )
    template = adapter_dir / TEMPLATE_NAME
    if template.is_file():
        model["chat_template"] = str(template)
    return model


def _recorded_base(adapter_dir: Path) -> BaseKeys:
    manifest = read_adapter_manifest(adapter_dir)
    base = manifest.get("base")
    if not isinstance(base, dict) or not all(
        isinstance(base.get(key), str) for key in ("origin", "path")
    ):
        raise LlmtuneError(
            f"{adapter_dir / MANIFEST_NAME}: damaged: expected `base` with origin and path"
        )
    trained = (manifest.get("config") or {}).get("model") or {}
    quantization = trained.get("quantization")
    if base.get("revision"):
        return {
            "base": base["origin"],
            "revision": base["revision"],
            "quantization": quantization,
        }
    is_local = Path(base["path"]).is_dir()
    return {"base": base["path"] if is_local else base["origin"], "quantization": quantization}


def run_target(name: str, config: RunConfig, *, opened: Checkpoint | None = None) -> Target:
    """Return the target that a run is; `opened` is its base if it is open already.

    Its merged model is there if the merge is finished on the adapter and the knobs of now.
    """
    run = config.run
    is_made = run.manifest_path.is_file()
    manifest = read_manifest(run) if is_made else Manifest(config={})
    has_adapter, has_merged = run.adapter_dir.is_dir(), run.merged_dir.is_dir()
    problem = None
    if has_merged:
        try:
            problem = MergeStage(config).why_unusable(manifest, with_base=False)
        except LlmtuneError as error:  # an adapter that is gone or damaged
            problem = str(error)
    return Target(
        name,
        config.model,
        adapter_dir=run.adapter_dir if has_adapter else None,
        merged_dir=run.merged_dir if has_merged and problem is None else None,
        merged_problem=problem,
        template_date=manifest.base.get("template_date"),
        opened=opened,
        keeps_quantized=False,
        config=config,
    )


def _judged_target(name: str, manifest: Manifest, overrides: Sequence[str]) -> Target:
    """Return what `llmtune judge` judged: its base, and what its directory links to."""
    run = RunDir(Path(name))
    return Target(
        name,
        _model(manifest.config["model"], overrides),
        adapter_dir=run.adapter_dir if run.adapter_dir.is_dir() else None,
        merged_dir=run.merged_dir if run.merged_dir.is_dir() else None,
        template_date=manifest.base.get("template_date"),
    )


def _model(values: Mapping[str, object], overrides: Sequence[str]) -> ModelConfig:
    tree = apply_overrides(SourcedTree({"model": values}), overrides)
    return validate_section(ModelOnly, tree).model
