"""Which checkpoint directory a base's name means: a path, a GGUF file, or a hub id."""

from dataclasses import dataclass
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.models.checkpoint import check_checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.gguf import dense_checkpoint
from llmtune.models.hub import HubUnreachable, fetch_snapshot, no_such_base, reads_as_hub_id


@dataclass(frozen=True)
class BaseSource:
    """Where a base model's files are, and where they came from."""

    dir: Path
    """Absolute path of a checkpoint directory that transformers loads."""
    origin: str
    """What was asked for: the absolute path given, or the hub id."""
    revision: str | None = None
    """The hub commit, 40 hex digits; null for local files."""
    gguf_sha256: str | None = None
    """SHA-256 of the GGUF file that the checkpoint was made from."""

    @property
    def adapter_base(self) -> str:
        """What an adapter records as its base: the hub id, or the checkpoint's absolute path."""
        return self.origin if self.revision is not None else str(self.dir)

    def as_dict(self) -> dict[str, str | None]:
        """Return the source as manifests record it."""
        return {
            "path": str(self.dir),
            "origin": self.origin,
            "revision": self.revision,
            "gguf_sha256": self.gguf_sha256,
        }


def resolve_base(config: ModelConfig, *, allow_quantized: bool = False) -> BaseSource:
    """Find the checkpoint that `config.base` names: a path if it exists, else a hub id.

    A GGUF file is turned into a dense checkpoint once and kept in the cache directory. Loads no
    torch unless a GGUF file is met for the first time.

    Raises:
        LlmtuneError: there is no such path and no such model, the hub cannot be reached (within
            5 s), or what is there is not a whole checkpoint.
    """
    path = Path(config.base).expanduser()
    allow_pickle = config.weights == "any"
    if path.exists():
        if config.revision is not None:
            raise LlmtuneError(
                f"model.revision={config.revision}: {path} is a local path, which has no "
                "revisions. Leave model.revision away, or give a hub id as model.base"
            )
        source = _local_source(path.absolute())
    else:
        source = _hub_source(config, allow_pickle=allow_pickle)
    check_checkpoint(source.dir, allow_pickle=allow_pickle, allow_quantized=allow_quantized)
    return source


def _local_source(path: Path) -> BaseSource:
    if path.is_dir():
        return BaseSource(dir=path, origin=str(path))
    if path.suffix == ".gguf":
        directory, sha256 = dense_checkpoint(path)
        return BaseSource(dir=directory, origin=str(path), gguf_sha256=sha256)
    raise LlmtuneError(
        f"model.base={path}: a file, but not a .gguf file. Give a checkpoint directory, a .gguf "
        "file or a hub id."
    )


def _hub_source(config: ModelConfig, *, allow_pickle: bool) -> BaseSource:
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
    return BaseSource(dir=directory, origin=name, revision=commit)
