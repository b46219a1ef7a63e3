"""Which checkpoint directory a base's name means: a path, a GGUF file, or a hub id."""

from dataclasses import replace
from pathlib import Path

from llmtune.errors import LlmtuneError
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.gguf import dense_checkpoint
from llmtune.models.hub import HubUnreachable, fetch_snapshot, no_such_base, reads_as_hub_id


def resolve_base(config: ModelConfig, *, allow_quantized: bool = False) -> Checkpoint:
    """Open the checkpoint that `config.base` names: a path if it exists, else a hub id.

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
                "revisions. Leave model.revision out, or give a hub id as model.base"
            )
        source = _local_source(path.absolute())
    else:
        source = _hub_source(config, allow_pickle=allow_pickle)
    source = replace(source, chat_template=config.chat_template)
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
