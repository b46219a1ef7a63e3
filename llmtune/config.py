"""The whole config of a run: one section a stage, from a YAML file and dotted overrides."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from llmtune.adapters.config import DEFAULT_ADAPTER, AdapterConfig
from llmtune.data.config import DataConfig, SourceConfig
from llmtune.evaluation.config import EvaluateConfig
from llmtune.exporting.config import ExportConfig
from llmtune.io.run_dir import RunDir
from llmtune.io.validation import lay_overrides, validate_section
from llmtune.io.yaml_source import KeyPath, SourcedTree, read_yaml
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

    @model_validator(mode="after")
    def _hand_on_system(self) -> Self:
        """Let the chat template print the system prompt of the data, whoever renders it."""
        if self.data.system is not None:
            self.__dict__["model"] = self.model.with_system(self.data.system)
        return self

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        reason = self.adapter.why_no_decay()
        if self.train.weight_decay and reason is not None:
            raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _check_shard(self) -> Self:
        if self.train.shard == "none":
            return self
        if self.model.storage.is_quantized:
            raise ValueError(
                "train.shard=full cuts floating-point weights, and "
                f"{self.model.quantization_method} packs them into bytes. Passed on as bfloat16, "
                "bytes that read as NaN are changed without a word (bitsandbytes issue 1945); as "
                "bytes, they are damaged or not cut at all (accelerate issues 3983, 3987). Set "
                "train.shard=none, so that every process has the whole "
                f"{self.model.quantization_method} base, or model.quantization=null"
            )
        if self.protect.kl_to_base is not None or self.protect.needs_own_text:
            raise ValueError(
                "train.shard=full trains without protect.kl_to_base and without the base's own "
                "text in protect.replay: the base would have to run by itself, whole. Replay rows "
                "of a file (protect.replay.source), use protect.l2, or set train.shard=none"
            )
        return self

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


def load_config(path: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config, or take a dict, and lay `key.path=value` overrides over it.

    A path in it is looked for in the current directory, then beside the config.

    Raises:
        LlmtuneError: all problems at once, each with file, line, key, what was expected and the
            nearest valid key.
    """
    if isinstance(path, Mapping):
        tree = SourcedTree(copy.deepcopy(dict(path)), {(): "the dict"})
        return validate_section(RunConfig, lay_overrides(RunConfig, tree, overrides))
    config = validate_section(RunConfig, read_config_tree(path, overrides))
    return find_beside(config, Path(path).parent)


def read_config_tree(path: str | Path, overrides: Sequence[str] = ()) -> SourcedTree:
    """Read config and overrides without checking them."""
    return lay_overrides(RunConfig, read_yaml(Path(path)), overrides)


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
    return replace_paths(config, _anchor)


def find_beside(config: RunConfig, folder: Path) -> RunConfig:
    """Return the config with the paths that are not here, but under `folder`, taken from there."""

    def find(name: str) -> str:
        there = folder / name
        return str(there) if not _is_there(Path(name).expanduser()) and _is_there(there) else name

    return replace_paths(config, find)


def replace_paths(config: RunConfig, find: Callable[[str], str]) -> RunConfig:
    """Return the config with each path that it reads from replaced by what `find` makes of it.

    Hub ids and names of shipped suites are among what `find` is given.
    """

    def find_file(path: Path | None) -> Path | None:
        return None if path is None else Path(find(str(path)))

    def find_files(files: Mapping[str, Path]) -> dict[str, Path]:
        return {name: Path(find(str(path))) for name, path in files.items()}

    def find_source(source: SourceConfig) -> SourceConfig:
        return source.model_copy(update={"path": find(source.path)})

    model, adapter, data, evaluate = config.model, config.adapter, config.data, config.evaluate
    protected = {
        name: part.model_copy(update={"source": find_source(part.source)})
        for name in ("replay", "kl_to_base")
        if (part := getattr(config.protect, name)) is not None
        and isinstance(part.source, SourceConfig)
    }
    return config.model_copy(
        update={
            "model": model.model_copy(
                update={
                    "base": find(model.base),
                    "chat_template": find_file(model.chat_template),
                }
            ),
            "adapter": adapter.model_copy(update={"init_from": find_file(adapter.init_from)}),
            "data": data.model_copy(
                update={
                    "train": [find_source(source) for source in data.train],
                    "evaluation": [find_source(source) for source in data.evaluation],
                }
            ),
            "protect": config.protect.model_copy(update=protected),
            "export": config.export.model_copy(
                update={"converter": find_file(config.export.converter)}
            ),
            "evaluate": evaluate.model_copy(
                update={
                    "suites": tuple(map(find, evaluate.suites)),
                    "prompts": find_files(evaluate.prompts),
                    "predictions": find_files(evaluate.predictions),
                }
            ),
        }
    )


def _is_there(path: Path) -> bool:
    if path.exists() or not is_pattern(str(path)):
        return path.exists()
    return any(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def _anchor(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if is_pattern(name) or path.exists() else name


def is_pattern(name: str) -> bool:
    """Whether a path has wildcards."""
    return any(character in name for character in "*?[")


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
