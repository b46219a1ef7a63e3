"""A base by its hub id: pinned to a commit, read from the local cache, fetched when it must be."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.errors import LlmtuneError
from llmtune.io.stopping import call_within, first_line
from llmtune.models.checkpoint import CONFIG_NAME, Checkpoint
from llmtune.models.stored.formats import read_format

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
# The whole look-up, name resolution included, so that an unreachable hub is an error within 5 s of
# the command's start.
LOOKUP_SECONDS = 3.5
FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]
PICKLES = ["pytorch_model*.bin"]
CODE = ["*.py"]


class HubUnreachable(Exception):
    """The hub did not answer; the message says why."""


def reads_as_hub_id(name: str) -> bool:
    """Whether `name` has the form org/name (and is not meant as a file)."""
    return HUB_ID.fullmatch(name) is not None and not name.endswith((".gguf", ".safetensors"))


def no_such_base(name: str) -> LlmtuneError:
    """Return the error for a name that is neither a path that exists nor a hub id."""
    return LlmtuneError(
        f"model.base={name}: no such local path ({Path(name).expanduser().absolute()}), and it "
        "does not read as a hub id org/name. Give the base's place, which may have moved since: "
        "model.base=PATH (a checkpoint directory, a .gguf file or a hub id)"
    )


def fetch_snapshot(
    repo: str, revision: str | None, *, allow_pickle: bool, allow_code: bool
) -> tuple[Path, str]:
    """Return the local directory of `repo` at `revision`, and the commit it is.

    A pinned commit that is cached whole needs no network. Otherwise the hub is asked for the
    commit; where it cannot be reached, or offline mode is set, the commit that the cache last saw
    for `revision` is used.

    Raises:
        HubUnreachable: the hub does not answer within LOOKUP_SECONDS, and nothing is cached.
        LlmtuneError: the hub answered: no such model or revision, or no access to it.
    """
    cached = _cached_snapshot(repo, revision, allow_pickle=allow_pickle)
    if cached is not None and COMMIT.fullmatch(revision or ""):
        return cached
    try:
        commit = _look_up_commit(repo, revision)
    except HubUnreachable:
        if cached is not None:
            return cached
        raise
    if cached is not None and cached[1] == commit:
        return cached
    _require_readable(repo, commit)
    return _download(repo, commit, allow_pickle=allow_pickle, allow_code=allow_code), commit


def _require_readable(repo: str, commit: str) -> None:
    """Refuse a base that is quantized in a way that is not read before its weights are fetched.

    Raises:
        LlmtuneError: it is.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HTTPError

    try:
        config = hf_hub_download(repo, CONFIG_NAME, revision=commit)
    except EntryNotFoundError:
        return  # what is there instead is said when it is opened
    except (HTTPError, OSError) as error:
        raise _broke_off(repo, error) from error
    read_format(Checkpoint.open(Path(config).parent).config, f"model.base={repo}")


def fetch_adapter(repo: str) -> Path | None:
    """Return the local directory of the adapter that a hub id names; None if it names a model.

    Raises:
        LlmtuneError: the hub cannot be reached and nothing is cached, or there is no such model.
    """
    from huggingface_hub import try_to_load_from_cache

    for name, is_adapter in (("adapter_config.json", True), ("config.json", False)):
        cached = try_to_load_from_cache(repo, name)
        if isinstance(cached, str):
            directory = Path(cached).parent
            if not is_adapter:
                return None
            if (directory / "adapter_model.safetensors").is_file():
                return directory
    try:
        info = _look_up(repo, None)
    except HubUnreachable as error:
        raise LlmtuneError(
            f"{repo}: no such local path ({Path(repo).absolute()}); and read as a hub id, it is "
            f"not in the local hub cache and the hub could not be reached ({error})"
        ) from error
    names = {file.rfilename for file in info.siblings or ()}
    if "adapter_config.json" not in names:
        return None
    return _download(repo, info.sha or "", allow_pickle=False, allow_code=False)


def _cached_snapshot(
    repo: str, revision: str | None, *, allow_pickle: bool
) -> tuple[Path, str] | None:
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    # .../models--org--name/snapshots/<commit>/config.json
    snapshot = Path(config).parent
    try:
        Checkpoint.open(snapshot).require_whole(allow_pickle=allow_pickle, allow_quantized=True)
    except LlmtuneError:
        return None  # an unfinished download; the hub is asked for the rest
    return snapshot, snapshot.name


def _look_up_commit(repo: str, revision: str | None) -> str:
    return _look_up(repo, revision).sha or ""


def _look_up(repo: str, revision: str | None) -> "ModelInfo":
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def ask() -> "ModelInfo":
        return HfApi().model_info(repo, revision=revision, timeout=LOOKUP_SECONDS)

    try:
        return call_within(LOOKUP_SECONDS, ask)
    except GatedRepoError as error:
        raise LlmtuneError(
            f"model.base={repo}: access to this model is restricted. Accept its licence on the hub "
            "and set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise LlmtuneError(f"model.revision={revision}: {repo} has no such revision.") from error
    except RepositoryNotFoundError as error:
        raise LlmtuneError(
            f"model.base={repo}: no such local path, and the hub has no such model (or it is "
            "private: set HF_TOKEN)."
        ) from error
    except HFValidationError as error:
        raise LlmtuneError(f"model.base={repo}: not a hub id: {error}") from error
    except (HTTPError, OSError) as error:
        raise HubUnreachable(first_line(error)) from error


def _download(repo: str, commit: str, *, allow_pickle: bool, allow_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    patterns = FILES + (PICKLES if allow_pickle else []) + (CODE if allow_code else [])
    try:
        return Path(snapshot_download(repo, revision=commit, allow_patterns=patterns))
    except (HTTPError, OSError) as error:
        raise _broke_off(repo, error) from error


def _broke_off(repo: str, error: Exception) -> LlmtuneError:
    return LlmtuneError(
        f"model.base={repo}: the download broke off: {first_line(error)}. "
        "The same command continues it."
    )
