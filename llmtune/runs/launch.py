"""A run as a job of a cluster: gather what it needs, write its files, hand it in."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from llmtune.config import RunConfig, is_pattern, replace_paths
from llmtune.data.hub import is_hub_id
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import JsonObject
from llmtune.io.run_dir import atomic_write_texts
from llmtune.io.yaml_source import read_yaml, shipped_files
from llmtune.launching.base import CONFIG_FILE, Engine, LaunchJob, read_package
from llmtune.launching.config import LaunchSettings, find_engine
from llmtune.models.hub import reads_as_hub_id

VARIABLE = re.compile(r"[A-Za-z_]\w*")
LONGEST_NAME = 40


@dataclass(frozen=True)
class Launched:
    """A job whose files are written, and that was handed in if that was asked for."""

    engine: str
    folder: Path
    files: tuple[Path, ...]
    command: tuple[str, ...]
    """What hands it in."""
    is_submitted: bool
    notes: tuple[str, ...]

    def as_json(self) -> JsonObject:
        """Return everything as JSON values."""
        return {
            "engine": self.engine,
            "folder": str(self.folder),
            "files": [str(path) for path in self.files],
            "command": list(self.command),
            "submitted": self.is_submitted,
            "notes": list(self.notes),
        }


def launch(config: RunConfig, settings: LaunchSettings) -> Launched:
    """Write the engine's own file for a run, and hand it in unless it is a dry one.

    Raises:
        LlmtuneError: the input is wrong, and nothing is written; or the engine's command is missing
            or failed, and the files are kept.
    """
    engine = find_engine(settings)
    job, elsewhere = make_job(config, settings, engine)
    engine.check(job)
    written = _write(engine, job)
    command = tuple(engine.submit_command(job))
    notes = (*(f"expected there: {name}" for name in elsewhere), *engine.notes(job))
    launched = Launched(engine.name, job.folder, written, command, False, notes)
    if settings.is_dry:
        return launched
    file = job.folder / engine.file
    if shutil.which(engine.program) is None:
        raise LlmtuneError(
            f"{engine.program} is not installed here; {file} is written: hand it in where it is, "
            f"with: {shlex.join(command)} (--dry-run only writes)"
        )
    missing = [name for name in job.env if name not in os.environ]
    if missing:
        raise LlmtuneError(f"--env {missing[0]}: not set in this shell; {file} is written")
    code = subprocess.run(command, check=False).returncode
    if code:
        raise LlmtuneError(f"{shlex.join(command)}: exit code {code}; {file} is written")
    return replace(launched, is_submitted=True)


def make_job(
    config: RunConfig, settings: LaunchSettings, engine: Engine
) -> tuple[LaunchJob, tuple[str, ...]]:
    """Return the job of a run, and the paths that must be on the machines already.

    Raises:
        LlmtuneError: a file of the config is missing, or the settings are wrong.
    """
    package = read_package(settings.package)
    for name in settings.env:
        if not VARIABLE.fullmatch(name):
            given = name.partition("=")[0]
            raise LlmtuneError(
                f"--env {given}: expected the name of an environment variable alone; its value is "
                "never written"
            )
    name = _job_name(config.run_dir)
    folder = settings.out or Path("launch") / f"{name}-{engine.name}"
    gathered = _Gathered(Path.cwd(), is_shared=engine.shares_files)
    for suite in config.evaluate.suites:
        gathered.find_suite(suite)
    there = replace_paths(config, gathered.find)
    if gathered.missing:
        raise LlmtuneError(
            f"{', '.join(gathered.missing)}: no such file here, and neither a hub id nor an "
            "absolute path that the machines have"
        )
    run_dir = engine.run_dir(config.run_dir, settings.store)
    values = {**there.model_dump(mode="json"), "run_dir": run_dir}
    inputs = dict(gathered.inputs)
    if package.wheel is not None and not engine.shares_files:
        inputs[package.wheel.name] = package.wheel
    job = LaunchJob(
        name=name,
        folder=folder,
        config_text=yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
        inputs=inputs,
        run_dir=run_dir,
        local_run_dir=config.run_dir,
        package=package,
        python=sys.executable,
        nodes=settings.nodes,
        gpus=settings.gpus,
        env=settings.env,
        store=settings.store,
        options=settings.options,
    )
    return job, tuple(gathered.elsewhere)


def _job_name(run_dir: Path) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", run_dir.absolute().name.lower()).strip("-")
    return f"llmtune-{name or 'run'}"[:LONGEST_NAME].rstrip("-")


@dataclass
class _Gathered:
    """What a config reads, by its place in the job's folder.

    A file below the current directory keeps its relative path, so that a run that comes back finds
    it; one from outside gets a place in `inputs/`. Machines that share the files need no copy.
    """

    here: Path
    is_shared: bool
    inputs: dict[str, Path] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    known: dict[str, str] = field(default_factory=dict)
    """How the job names what the config calls so."""

    def find(self, name: str) -> str:
        """Return how the job names what the config calls `name`, and bring it along."""
        if name not in self.known:
            self.known[name] = self._find(name, Path(name).expanduser())
        return self.known[name]

    def _find(self, name: str, path: Path) -> str:
        if path.exists():
            return self._bring(path.parent, [path], path)
        if is_pattern(name):
            fixed = itertools.takewhile(lambda part: not is_pattern(part), path.parts)
            root = Path(*fixed)
            found = sorted(root.glob(str(path.relative_to(root)))) if root.exists() else []
            if found:
                return self._bring(root, found, path)
        if path.is_absolute():
            self.elsewhere.append(name)
        elif not (is_hub_id(name) and reads_as_hub_id(name)) and name not in shipped_files("evals"):
            self.missing.append(name)
        return name

    def find_suite(self, name: str) -> None:
        """Bring a suite's file along with its items, which it names relative to itself."""
        path = Path(name).expanduser()
        if not path.is_file():
            return
        named = read_yaml(path).values.get("items")
        items = path.parent / named if isinstance(named, str) else path
        if not items.is_file():
            raise LlmtuneError(f"{items}: the items of the suite {name} are not there")
        root = Path(os.path.commonpath([_whole(path).parent, _whole(items).parent]))
        self.known[name] = self._bring(root, [path, items], path)

    def _bring(self, root: Path, paths: Sequence[Path], named: Path) -> str:
        """Bring what is below `root`, in the same places; return the place of `named`."""
        if self.is_shared:
            return str(_whole(named))
        root = _whole(root)
        if root.is_relative_to(self.here):
            place = str(root.relative_to(self.here))
        else:
            places = (f"inputs/{number}" for number in itertools.count(1))
            place = next(place for place in places if not self._is_taken(place))
        for path in paths:
            self.inputs[os.path.normpath(f"{place}/{_whole(path).relative_to(root)}")] = _whole(
                path
            )
        return os.path.normpath(f"{place}/{_whole(named).relative_to(root)}")

    def _is_taken(self, place: str) -> bool:
        """Whether the job has something there, or may get it: from the directory it is made in."""
        return (self.here / place).exists() or any(
            Path(name).is_relative_to(place) for name in self.inputs
        )


def _whole(path: Path) -> Path:
    """Return the absolute path without `..`, symbolic links as they are."""
    return Path(os.path.normpath(path.absolute()))


def _write(engine: Engine, job: LaunchJob) -> tuple[Path, ...]:
    """Write config and engine's files, all or none; return where they are."""
    folder = job.folder
    known = {CONFIG_FILE, engine.file}
    there = {each.name for each in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or (there and not known <= there):
        raise LlmtuneError(f"{folder}: holds something other than a job; choose another --out")
    if engine.gathers_inputs and _whole(folder) == Path.cwd():
        raise LlmtuneError(f"--out {folder}: holds the inputs themselves; choose another --out")
    texts = {job.config_path: job.config_text}
    texts |= {folder / name: text for name, text in engine.files(job).items()}
    atomic_write_texts(texts)
    if engine.gathers_inputs:
        for name, path in job.inputs.items():
            if not any(str(parent) in job.inputs for parent in Path(name).parents):
                _link(folder, name, path)
    return tuple(texts)


def _link(folder: Path, name: str, path: Path) -> None:
    """Link an input into the job's folder, in place of what an earlier launch linked there.

    Raises:
        LlmtuneError: something other than links is there.
    """
    link = folder / name
    for parent in reversed(link.relative_to(folder).parents):
        if parent.name and (folder / parent).is_symlink():  # what is in it is the user's
            (folder / parent).unlink()
    _remove_links(link)
    if link.exists():
        raise LlmtuneError(f"{link}: is in the way of a link to {path}; choose another --out")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(path)


def _remove_links(path: Path) -> None:
    """Remove a link, or a directory that holds nothing but links."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        for each in path.iterdir():
            _remove_links(each)
        if not any(path.iterdir()):
            path.rmdir()
