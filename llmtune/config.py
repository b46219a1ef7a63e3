"""The whole config of a run: one section a stage, from a YAML file and dotted overrides."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from llmtune.adapters.config import DEFAULT_ADAPTER, AdapterConfig
from llmtune.data.config import DataConfig, SourceConfig
from llmtune.evaluation.config import EvaluateConfig
from llmtune.exporting.config import ExportConfig
from llmtune.io.run_dir import RunDir
from llmtune.io.validation import validate_section
from llmtune.io.yaml_source import KeyPath, SourcedTree, apply_overrides, read_yaml
from llmtune.merging.config import MergeConfig
from llmtune.models.config import ModelConfig
from llmtune.schema import Section
from llmtune.training.config import TrainConfig
from llmtune.training.protect.config import ProtectConfig, add_replay


class RunConfig(Section):
    """Everything one run needs; only the command line and the pipeline see all of it."""

    run_dir: Path
    """Where the run keeps adapter, merged model, checkpoints, evaluations and report."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Decides data order, adapter initialization, dropout and bootstrap samples."""
    model: ModelConfig
    adapter: AdapterConfig = DEFAULT_ADAPTER
    data: DataConfig
    train: TrainConfig = TrainConfig()
    protect: ProtectConfig = ProtectConfig()
    merge: MergeConfig = MergeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()

    @property
    def mixed_data(self) -> DataConfig:
        """The data that is trained on: `data`, with what `protect.replay` adds."""
        return add_replay(self.data, self.protect)

    @property
    def run(self) -> RunDir:
        """Return the run directory that the config names."""
        return RunDir(self.run_dir)


@dataclass(frozen=True)
class EffectiveKey:
    """One key of the effective config: its dotted path, its value, and where the value is from."""

    path: str
    value: Any
    origin: str


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config and lay `key.path=value` overrides over it.

    Raises:
        LlmtuneError: all problems at once, each with file, line, key, what was expected and the
            nearest valid key.
    """
    return validate_section(RunConfig, read_config_tree(path, overrides))


def read_config_tree(path: str | Path, overrides: Sequence[str] = ()) -> SourcedTree:
    """Read config and overrides without checking them."""
    return apply_overrides(read_yaml(Path(path)), overrides)


def effective_keys(config: RunConfig, tree: SourcedTree) -> list[EffectiveKey]:
    """List every key with its value and its origin: a file's line, an override, or `default`."""
    values = config.model_dump(mode="json")
    return [
        EffectiveKey(".".join(map(str, path)), value, _exact_origin(tree, path))
        for path, value in _leaves(values, ())
    ]


def anchor_paths(config: RunConfig) -> RunConfig:
    """Return the config with every path that exists made absolute, so that it works anywhere.

    Hub ids, names of shipped suites and `run_dir` stay as they are.
    """
    model, data = config.model, config.data
    return config.model_copy(
        update={
            "model": model.model_copy(
                update={
                    "base": _anchor(model.base),
                    "chat_template": model.chat_template and model.chat_template.absolute(),
                }
            ),
            "adapter": config.adapter.model_copy(
                update={
                    "init_from": config.adapter.init_from and config.adapter.init_from.absolute()
                }
            ),
            "data": data.model_copy(
                update={
                    split: [
                        source.model_copy(update={"path": _anchor(source.path)})
                        for source in getattr(data, split)
                    ]
                    for split in ("train", "evaluation")
                }
            ),
            "protect": _anchor_protect(config.protect),
            "evaluate": config.evaluate.model_copy(
                update={
                    "suites": tuple(_anchor(suite) for suite in config.evaluate.suites),
                    "prompts": _anchor_files(config.evaluate.prompts),
                    "predictions": _anchor_files(config.evaluate.predictions),
                }
            ),
        }
    )


def _anchor_files(files: Mapping[str, Path]) -> dict[str, Path]:
    return {name: path.expanduser().absolute() for name, path in files.items()}


def _anchor_protect(protect: ProtectConfig) -> ProtectConfig:
    changed = {}
    for name in ("replay", "kl_to_base"):
        part = getattr(protect, name)
        if part is not None and isinstance(part.source, SourceConfig):
            source = part.source.model_copy(update={"path": _anchor(part.source.path)})
            changed[name] = part.model_copy(update={"source": source})
    return protect.model_copy(update=changed)


def _anchor(name: str) -> str:
    path = Path(name).expanduser()
    is_pattern = any(character in name for character in "*?[")
    return str(path.absolute()) if is_pattern or path.exists() else name


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(child, (*path, key))
    elif isinstance(value, list) and any(isinstance(child, dict) for child in value):
        for index, child in enumerate(value):
            yield from _leaves(child, (*path, index))
    else:
        yield path, value


def _exact_origin(tree: SourcedTree, path: KeyPath) -> str:
    """Return where `path` was written, itself or as part of an override's value."""
    if tree.written(path) != path:
        return "default"
    return tree.origin(path) or "default"
