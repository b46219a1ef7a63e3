"""Which checkpoint directory a base's name means: a path, a GGUF file, or a hub id."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.dequantized import dequantize, plan_dequantization
from llmtune.models.gguf import dense_checkpoint
from llmtune.models.hub import HubUnreachable, fetch_snapshot, no_such_base, reads_as_hub_id


@dataclass(frozen=True)
class Loadable:
    """What to load: a base, the adapter on it if any, the merged model of a run if any.

    Its checkpoints are opened once, when they are first asked for, and passed on.
    """

    name: str
    """As the user gave it."""
    model: ModelConfig
    adapter_dir: Path | None = None
    merged_dir: Path | None = None
    merged_problem: str | None = None
    """Why a merged model that is there may not be used, and what to do about it."""
    template_date: str | None = None
    """The date (YYYY-MM-DD) that the base's chat template prints; null is the day's."""
    opened: Checkpoint | None = None
    """The base, if it is open already."""
    keeps_quantized: bool = True
    """Whether a base that transformers loads quantized stays so; false for what was trained on the
    dense checkpoint made from it."""

    @property
    def arms(self) -> tuple[str, ...]:
        """Who can answer, the default first."""
        arms = ["tuned"] if self.adapter_dir else []
        arms.append("base")
        return tuple(arms + (["merged"] if self.merged_dir else []))

    @cached_property
    def base(self) -> Checkpoint:
        """The base, which may be stored quantized; raises as `resolve_base` does."""
        if self.opened is not None:
            return self.opened
        source = resolve_base(self.model, allow_quantized=self.keeps_quantized)
        return replace(source, template_date=self.template_date)

    @cached_property
    def dense_base(self) -> Checkpoint:
        """The same, for what a quantized checkpoint cannot be used for: the dense one made of it.

        Raises:
            LlmtuneError: as `resolve_base`.
        """
        if not self.base.is_quantized:
            return self.base
        return replace(resolve_base(self.model), template_date=self.template_date)

    @cached_property
    def merged(self) -> Checkpoint:
        """The merged model.

        Raises:
            LlmtuneError: there is none, or it may not be used.
        """
        if self.merged_dir is None:
            raise LlmtuneError(
                self.merged_problem
                or f"{self.name}: there is no merged model yet; make it with: "
                f"llmtune merge {self.name}"
            )
        merged = Checkpoint.open(self.merged_dir, template=self.model.template)
        merged = replace(merged, template_date=self.template_date)
        merged.require_whole(allow_pickle=False)
        return merged


def resolve_base(config: ModelConfig, *, allow_quantized: bool = False) -> Checkpoint:
    """Open the checkpoint that `config.base` names: a path if it exists, else a hub id.

    A GGUF file or a quantized checkpoint is turned into a dense one once, which is kept in the
    cache directory. Loads no torch unless one is met for the first time.

    Args:
        allow_quantized: leave a checkpoint as it is if transformers loads it quantized.

    Raises:
        LlmtuneError: there is no such path and no such model, the hub cannot be reached (within
            5 s), or what is there is not a whole checkpoint, or is quantized in a way that is not
            read.
    """
    path = Path(config.base).expanduser()
    allow_pickle = config.weights == "any"
    if path.exists():
        if config.revision is not None:
            raise LlmtuneError(
                f"model.revision={config.revision}: {path} is a local path, which has no "
                "revisions. Leave model.revision out, or give a hub id as model.base"
            )
        source = _local_source(path.absolute())
    else:
        source = _hub_source(config, allow_pickle=allow_pickle)
    source = replace(source, template=config.template)
    plan = plan_dequantization(source, keeps_loadable=allow_quantized)
    if plan is not None:
        return dequantize(plan)
    source.require_whole(allow_pickle=allow_pickle, allow_quantized=allow_quantized)
    return source


def _local_source(path: Path) -> Checkpoint:
    if path.is_dir():
        return Checkpoint(path, origin=str(path))
    if path.suffix == ".gguf":
        directory, sha256 = dense_checkpoint(path)
        return Checkpoint(directory, origin=str(path), gguf_sha256=sha256)
    raise LlmtuneError(
        f"model.base={path}: a file, but not a .gguf file. Give a checkpoint directory, a .gguf "
        "file or a hub id."
    )


def _hub_source(config: ModelConfig, *, allow_pickle: bool) -> Checkpoint:
    name = config.base
    if not reads_as_hub_id(name):
        raise no_such_base(name)
    if config.trust_remote_code and config.revision is None:
        raise LlmtuneError(
            f"model.trust_remote_code=true runs code from {name}: pin it with "
            "model.revision=<commit>."
        )
    try:
        directory, commit = fetch_snapshot(
            name,
            config.revision,
            allow_pickle=allow_pickle,
            allow_code=config.trust_remote_code,
        )
    except HubUnreachable as error:
        raise LlmtuneError(
            f"model.base={name}: no such local path ({Path(name).absolute()}); and read as a hub "
            f"id, it is not in the local hub cache and the hub could not be reached ({error}). "
            "Give the base's place, model.base=PATH, or connect to the network once."
        ) from error
    return Checkpoint(directory, origin=name, revision=commit)
