"""What a cluster engine says of itself, and the job it starts, in plain values (light)."""

import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, Literal, TypeVar
from urllib.parse import urlsplit

import yaml

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import hash_file, hash_json

T = TypeVar("T")
R = TypeVar("R")

CONFIG_FILE = "config.yaml"
"""The config as the job runs it, beside the engine's file."""
FETCH_FILE = "fetch.sh"
"""The script that brings the run directory back."""
TEMPORARY_OPTION = "--temporary-code"
"""Of `launching.torchrun`: with which exit code it asks its engine to try again."""
PORT = 29400
"""Where the processes of several nodes find each other."""
WHEEL = re.compile(r"llmtune-[^-]+(-\d[^-]*)?-py3-none-any\.whl")
PIN = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}|refs/tags/.+", re.IGNORECASE)
"""What does not move: a whole commit, or a tag that is said to be one; a name may be a branch."""
INSTALLED = "installed"
PACKAGES = (
    "a wheel (dist/llmtune-VERSION-py3-none-any.whl, made by: python -m pip wheel --no-deps -w "
    "dist CLONE), a git source with its whole commit or its tag (git+https://HOST/PATH@COMMIT, "
    "...@refs/tags/TAG), or "
    f"{INSTALLED!r} if the machines have llmtune already"
)


@dataclass(frozen=True)
class Package:
    """Where the machines get llmtune from: a wheel of ours, a git source, or nothing to install."""

    text: str
    """As the user gave it."""
    wheel: Path | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the machines have it already."""
        return self.text == INSTALLED

    @property
    def key(self) -> str:
        """What tells its content from that of others; a wheel may change under its name."""
        return (hash_json(self.text) if self.wheel is None else hash_file(self.wheel))[:12]

    def requirement(self, *, is_shared: bool = False) -> str:
        """Return what pip is given in the job's folder, or where this machine's files are seen."""
        if self.wheel is None:
            return self.text
        return str(self.wheel) if is_shared else f"./{self.wheel.name}"


def read_package(text: str | None) -> Package:
    """Return what `--package` means.

    Raises:
        LlmtuneError: it is not given, not pinned, a name that an index resolves, or holds a secret.
    """
    if not text:
        raise LlmtuneError(f"--package: say where the machines get llmtune from: {PACKAGES}")
    if text == INSTALLED:
        return Package(text)
    path = Path(text).expanduser()
    if WHEEL.fullmatch(path.name):
        if not path.is_file():
            raise LlmtuneError(f"--package {text}: no such file; expected {PACKAGES}")
        return Package(text, path.absolute())
    if text.startswith("git+"):
        try:
            place = urlsplit(text)
        except ValueError as error:
            raise LlmtuneError(f"--package: cannot be read as an address ({error})") from None
        if place.password is not None or (place.username and place.scheme != "git+ssh"):
            raise LlmtuneError(
                "--package: the address holds a user or a password, which would be written to the "
                "job's file; leave it out, and let git on the machines ask for it"
            )
        _, at, ref = place.path.rpartition("@")
        if not (at and ref):
            raise LlmtuneError(f"--package {text}: names no commit or tag; add @COMMIT at its end")
        if not PIN.fullmatch(ref):
            raise LlmtuneError(
                f"--package {text}: {ref!r} may be a branch, which moves between two starts of the "
                "job; give the whole commit (the 40 digits that `git rev-parse` prints), or a tag "
                f"as @refs/tags/{ref}"
            )
        return Package(text)
    raise LlmtuneError(
        f"--package {text}: expected {PACKAGES}. A bare name is never installed: on the public "
        "index it belongs to somebody else"
    )


@dataclass(frozen=True)
class EngineOption:
    """An option of `llmtune launch` that some engines read, under its name with dashes."""

    name: str
    help: str
    kind: Literal["text", "flag"] = "text"


@dataclass(frozen=True)
class LaunchJob:
    """One run as a job: all that an engine's file is made from."""

    name: str
    """Of letters, digits and dashes, as every engine takes it."""
    folder: Path
    """Where its files are written, here."""
    config_text: str
    """The whole config in YAML, with paths as they are in the job's folder there."""
    inputs: Mapping[str, Path]
    """What is brought along: its name in the job's folder -> where it is here."""
    run_dir: str
    """As the job's config names it."""
    local_run_dir: Path
    """Where the run directory belongs here."""
    package: Package
    python: str
    """This process's interpreter, for machines that share its files."""
    nodes: int = 1
    gpus: int = 1
    """On each node; 0 is one process a node, on its CPU."""
    env: tuple[str, ...] = ()
    """Names of environment variables that the job needs. Their values are never written."""
    store: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    """What was given of the engine's own options; a flag is "true"."""

    @property
    def config_path(self) -> Path:
        """Return the file of the config, here."""
        return self.folder / CONFIG_FILE

    def option(self, name: str) -> str | None:
        """Return one of the engine's options, or None if it was not given."""
        return self.options.get(name)

    def command(
        self,
        config: str,
        *,
        python: str = "python",
        node_rank: str = "0",
        address: str = "",
        temporary_code: int | None = None,
    ) -> str:
        """Return the shell command of one node: the one that a user types on one machine.

        With several processes it ends with the run's own exit code, as with one.

        Args:
            config: the config's path there.
            python: the interpreter, as the shell reads it.
            node_rank: the node's number, as the shell reads it.
            address: the first node's, as the shell reads it.
            temporary_code: what several processes end with where trying again may help.
        """
        run = f"-m llmtune run {shlex.quote(config)}"
        if self.nodes == 1 and self.gpus <= 1:
            return f"{python} {run}"
        start = f"{python} -m llmtune.launching.torchrun"
        if temporary_code is not None:
            start += f" {TEMPORARY_OPTION} {temporary_code}"
        start += f" --nproc-per-node {max(self.gpus, 1)}"
        if self.nodes == 1:
            return f"{start} --standalone {run}"
        return (
            f"{start} --nnodes {self.nodes} --node-rank {node_rank} --master-addr {address} "
            f"--master-port {PORT} {run}"
        )

    def install_lines(self, venv: str, *, is_shared: bool = False) -> list[str]:
        """Return shell lines that make a virtual environment with llmtune; none if it is there.

        Args:
            venv: its directory there, as the shell reads it.
            is_shared: whether the machines see this machine's files.
        """
        if self.package.is_installed:
            return []
        requirement = shlex.quote(self.package.requirement(is_shared=is_shared))
        return [
            "python=$(command -v python3.13 python3.12 python3.11 | head -n 1 || true)",
            'if [ -z "$python" ]; then',
            '  command -v conda >/dev/null || { echo "no Python 3.11 or newer" >&2; exit 1; }',
            f'  conda create --yes --quiet --prefix {venv}-python "python=3.12"',
            f"  python={venv}-python/bin/python",
            "fi",
            f'"$python" -m venv --clear {venv}',
            f"{venv}/bin/python -m pip install {requirement}",
        ]

    def require_lines(self) -> list[str]:
        """Return shell lines that end the job if an environment variable is missing."""
        return [f': "${{{name}:?the job needs {name} in its environment}}"' for name in self.env]


@dataclass(frozen=True)
class Called(Generic[R]):
    """One call of a function that an engine has made."""

    number: int
    """Of the value."""
    value: R | None = None
    lost: str | None = None
    """Why it came to no end: its process or its machine was lost, and calling again may help."""
    broken: str | None = None
    """What the function failed by in a way that is a bug."""


class Engine(ABC):
    """One cluster engine; it is listed in `launching.config.ENGINES`."""

    name: ClassVar[str]
    """For `--on`."""
    program: ClassVar[str]
    """The command that takes its file."""
    file: ClassVar[str]
    """What its file is called."""
    shares_files: ClassVar[bool] = False
    """Whether the machines see this machine's files, so that nothing is brought."""
    gathers_inputs: ClassVar[bool] = False
    """Whether inputs must be in the folder beside its file; links to them are made there."""
    store_help: ClassVar[str] = ""
    """What `--store` means for it; empty if there is no use for it."""
    options: ClassVar[tuple[EngineOption, ...]] = ()
    calls_functions: ClassVar[bool] = False
    """Whether it can call a function for several values at once: `call_each`."""

    def check(self, job: LaunchJob) -> None:  # noqa: B027
        """Check what was asked for before anything is written.

        Raises:
            LlmtuneError: something is missing, or cannot be done by this engine.
        """

    def run_dir(self, run_dir: Path, store: str | None) -> str:
        """Return where the job keeps the config's run directory."""
        is_below = not run_dir.is_absolute() and ".." not in run_dir.parts
        return str(run_dir) if is_below else f"runs/{run_dir.name}"

    @abstractmethod
    def files(self, job: LaunchJob) -> dict[str, str]:
        """Return the text of the engine's file, and of others beside it, by name."""

    @abstractmethod
    def submit_command(self, job: LaunchJob) -> list[str]:
        """Return the command that hands the job in, run in this directory."""

    def call_each(
        self, function: Callable[[T], R], values: Sequence[T], *, wants_gpu: bool
    ) -> Iterator["Called[R]"]:
        """Call a function for every value, several at once on its machines; yield what has ended.

        The machines see this directory under the same path.

        Args:
            function: of a module, so that a machine finds it by name.
            values: what it is called with, one each.
            wants_gpu: whether a call takes a GPU where there are some, or else a whole machine.

        Raises:
            LlmtuneError: it cannot call functions, or its library is not installed.
        """
        raise LlmtuneError(f"--on {self.name}: it starts jobs, and cannot call functions")

    @abstractmethod
    def notes(self, job: LaunchJob) -> Sequence[str]:
        """Return what the user should know: what is needed there, and how the run comes back."""


class _Plain(yaml.SafeDumper):
    """YAML as people write it: scripts as blocks, nothing said by reference."""

    def ignore_aliases(self, data: object) -> bool:
        """Write out what is there twice."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Plain.add_representer(str, _represent_text)


def dump_yaml(*documents: Mapping[str, object]) -> str:
    """Return documents as YAML."""
    return yaml.dump_all(documents, Dumper=_Plain, sort_keys=False, width=1000)


def script(lines: Sequence[str]) -> str:
    """Return a shell script that ends with its first error."""
    return "\n".join(["#!/usr/bin/env bash", "set -euo pipefail", *lines]) + "\n"
