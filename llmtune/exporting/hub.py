"""Push a model to a hub: private unless asked otherwise, token from the environment."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmtune.adapters.manifest import CONFIG_NAME, MANIFEST_NAME, read_adapter_manifest
from llmtune.errors import LlmtuneError
from llmtune.exporting.base import Exported, Exporter, ExportOption
from llmtune.exporting.card import CARD_NAME
from llmtune.io.fingerprint import JsonObject
from llmtune.io.json_files import read_json_object
from llmtune.io.stopping import first_line
from llmtune.models.hub import reads_as_hub_id

if TYPE_CHECKING:
    from llmtune.exporting.export import ExportJob

TOKEN_VARIABLE = "HF_TOKEN"
ENDPOINT_VARIABLE = "HF_ENDPOINT"
KEPT_HERE = frozenset({"llmtune_merge.json", "llmtune_adapter.json", "llmtune_base.json"})
"""Our own records, which hold paths of this machine."""


class HubExporter(Exporter):
    """A run's merged model, an adapter or a whole model, pushed with its model card."""

    name = "hub"
    is_made_by_runs = False
    options = (
        ExportOption("repo", "For the hub: org/name.", "text"),
        ExportOption("public", "For the hub: readable by everyone.", "flag"),
    )

    def export(self, job: "ExportJob") -> Exported:
        """Push every file in one commit, after the token was found."""
        repo = job.option("repo")
        check_push(repo)
        source = job.source
        is_adapter = source.run_dir is None and source.adapter_dir is not None
        result = push_directory(
            job.adapter_dir if is_adapter else job.model.directory,
            repo,
            card=job.card(repo.partition("/")[2], {}),
            public=bool(job.option("public")),
        )
        return Exported(self.name, result.url, result.to_dict())


@dataclass(frozen=True)
class HubResult:
    """What was pushed and where it is."""

    repo: str
    url: str
    commit: str
    is_private: bool
    num_bytes: int
    files: tuple[str, ...]

    def to_dict(self) -> JsonObject:
        """Return the result as JSON."""
        return asdict(self)


def check_push(repo: str | None) -> str:
    """Check that a push can begin, before anything is computed for it; return the token.

    Raises:
        LlmtuneError: there is no token in the environment, or `repo` is not `org/name`.
    """
    if repo is None or not reads_as_hub_id(repo):
        raise LlmtuneError(f"--repo {repo}: expected org/name")
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise LlmtuneError(
            f"a push needs a token with write access in the environment variable {TOKEN_VARIABLE}; "
            "it is read from nowhere else, and never written anywhere"
        )
    return token


def push_directory(directory: Path, repo: str, *, card: str, public: bool) -> HubResult:
    """Create the repository if it is not there, and push every file in one commit.

    Records that hold paths of this machine stay here, and an adapter names its base by the hub id
    or the last part of its path. An existing repository keeps its visibility; if it is public
    and `public` is not asked for, nothing is pushed.

    Args:
        directory: a model or an adapter.
        repo: `org/name`.
        card: the model card, for a directory without one.
        public: let everyone read a new repository.

    Raises:
        LlmtuneError: no token, no access, an existing public repository, or the hub cannot be
            reached. The token is in no message.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    api = HfApi(endpoint=os.environ.get(ENDPOINT_VARIABLE), token=check_push(repo))
    files = _files(directory)
    operations = [CommitOperationAdd(name, _content(path)) for name, path in files.items()]
    if CARD_NAME not in files:
        operations.append(CommitOperationAdd(CARD_NAME, card.encode()))
    try:
        url = api.create_repo(repo, private=not public, exist_ok=True)
        is_private = bool(api.model_info(repo).private)
        if not is_private and not public:
            raise LlmtuneError(
                f"{repo}: exists and is public; give --public, or choose another --repo"
            )
        commit = api.create_commit(repo, operations, commit_message="Upload with llmtune")
    except HfHubHTTPError as error:
        raise LlmtuneError(f"{repo}: the hub refused: {first_line(error)}") from None
    except (OSError, HTTPError) as error:
        raise LlmtuneError(f"{repo}: the hub could not be reached: {first_line(error)}") from None
    return HubResult(
        repo=repo,
        url=str(url),
        commit=commit.oid,
        is_private=is_private,
        num_bytes=sum(path.stat().st_size for path in files.values()),
        files=tuple(sorted({*files, CARD_NAME})),
    )


def _content(path: Path) -> Path | bytes:
    """Return what is pushed of one file: the file itself, or an adapter's config without a path."""
    if path.name != CONFIG_NAME:
        return path
    config = read_json_object(path)
    base = str(config.get("base_model_name_or_path") or "")
    if not Path(base).is_absolute():
        return path
    manifest = path.with_name(MANIFEST_NAME)
    known = read_adapter_manifest(path.parent).get("base", {}) if manifest.is_file() else {}
    origin = str(known.get("origin") or base)
    config["base_model_name_or_path"] = origin if known.get("revision") else Path(origin).name
    return (json.dumps(config, indent=2) + "\n").encode()


def _files(directory: Path) -> dict[str, Path]:
    """Return what is pushed, by its name in the repository."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and name.name not in KEPT_HERE:
            found[name.as_posix()] = path
    if not found:
        raise LlmtuneError(f"{directory}: holds no files to push")
    return found
