"""An open run: locked against other processes, and knowing which stages are finished."""

import contextlib
import fcntl
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtune.data.problems import name_first
from llmtune.errors import LlmtuneError
from llmtune.io.environment import peak_memory_bytes
from llmtune.io.fingerprint import JsonObject, hash_json
from llmtune.io.manifest import BaseRecord, Manifest, StageRecord, read_manifest
from llmtune.io.run_dir import SEEDS_FILE, SWEEP_FILE, RunDir

log = logging.getLogger("llmtune")

SHOWN_DIFFERENCES = 5

Completion = Callable[[Mapping[str, Any]], JsonObject]
Outputs = Callable[[StageRecord], Iterable[Path]]


class Ledger:
    """Writes down what each stage of one run directory was made from, and knows which are finished.

    Use `open_ledger`; one process at a time holds a run.
    """

    def __init__(self, run: RunDir, manifest: Manifest) -> None:
        self.run = run
        self.manifest = manifest
        self._began = time.perf_counter()

    def describe(
        self, *, base: BaseRecord | None = None, data: Mapping[str, Any] | None = None
    ) -> None:
        """Write base and data of the run into the manifest; what is not given stays."""
        now = self.manifest
        self._save(
            replace(
                now,
                base=now.base if base is None else base,
                data=now.data if data is None else data,
            )
        )

    def finished(
        self,
        name: str,
        inputs: JsonObject,
        *,
        complete: Completion = lambda inputs: inputs,
        outputs: Outputs = lambda record: (),
    ) -> JsonObject | None:
        """Return the result of a stage that is finished on these inputs, or None.

        Args:
            name: of the stage.
            inputs: everything that decides the result.
            complete: gives recorded inputs what this version added to them since.
            outputs: names what a finished stage has left; if any of it is gone, it is not finished.
        """
        record = self.manifest.record(name)
        if not _is_finished(record, inputs, complete, outputs):
            return None
        log.info("%s: finished before on the same inputs, skipped", name)
        return record["result"]

    def begin(self, name: str, inputs: JsonObject) -> None:
        """Record that a stage has begun; until `finish`, it and every later one are unfinished."""
        self._save(self.manifest.start(name, hash_json(inputs), inputs))
        self._began = time.perf_counter()

    def finish(self, name: str, result: Mapping[str, Any]) -> None:
        """Record the result of the stage that was begun last."""
        self._save(
            self.manifest.finish(
                name,
                seconds=round(time.perf_counter() - self._began, 3),
                peak_bytes=peak_memory_bytes(),
                result=result,
            )
        )

    def _save(self, manifest: Manifest) -> None:
        manifest.save(self.run)
        self.manifest = manifest


def _is_finished(
    record: StageRecord, inputs: JsonObject, complete: Completion, outputs: Outputs
) -> bool:
    """Whether a stage is finished on these inputs, and what it left is all there."""
    return (
        bool(record.get("finished"))
        and "inputs" in record
        and hash_json(complete(record["inputs"])) == hash_json(inputs)
        and all(path.exists() for path in outputs(record))
    )


@contextlib.contextmanager
def open_ledger(
    run: RunDir,
    config: Mapping[str, Any],
    *,
    deciding: Completion,
    is_recorded: bool = True,
    force: bool = False,
) -> Iterator[Ledger]:
    """Hold the run directory, making it if there is none.

    `config` is the whole config as JSON values, recorded if `is_recorded`; `deciding` returns
    those of a config's that may not differ from what the directory was made with, once training has
    left something there; what an older config lacks it returns as its default. With `force` what
    earlier stages left is removed. A directory that was made here disappears again if the input
    turns out wrong before anything was trained.

    Raises:
        LlmtuneError: another process holds the run, the directory is not a run, or it holds a run
            of a different config.
    """
    _refuse_foreign(run)
    is_new = not run.manifest_path.exists()
    _make(run)
    with run.lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LlmtuneError(
                f"{run.path}: another llmtune process is working in this run; "
                "wait for it or choose another run_dir"
            ) from None
        if force:
            _clear(run)
        manifest = Manifest(config=config)
        if run.manifest_path.exists():
            known = read_manifest(run)
            if has_training(run):
                _refuse_other_config(run, deciding(known.config), deciding(config))
            manifest = replace(known, config=config) if is_recorded else known
        ledger = Ledger(run, manifest)
        ledger.describe()
        try:
            yield ledger
        except LlmtuneError:
            if is_new and not has_training(run):
                _clear(run)
                run.lock_path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # the user keeps something else there
                    run.path.rmdir()
            raise


def refuse_unusable(
    run: RunDir, config: Mapping[str, Any], deciding: Completion, *, force: bool = False
) -> None:
    """Refuse at once, before any long work, what `open_ledger` would refuse; nothing is written.

    Raises:
        LlmtuneError: the directory is not a run, or it holds a run of a different config.
    """
    _refuse_foreign(run)
    if not force and run.manifest_path.exists() and has_training(run):
        _refuse_other_config(run, deciding(read_manifest(run).config), deciding(config))


def _make(run: RunDir) -> None:
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LlmtuneError(
            f"{run.path}: cannot be made ({error.strerror}); choose another run_dir"
        ) from None


def _refuse_foreign(run: RunDir) -> None:
    if run.path.exists() and not run.path.is_dir():
        raise LlmtuneError(f"{run.path}: is a file; run_dir must be a directory to make or reuse")
    if run.path.is_dir() and not run.manifest_path.exists():
        found = sorted(child.name for child in run.path.iterdir() if not child.name.startswith("."))
        if found:
            raise LlmtuneError(
                f"{run.path}: holds {found[0]!r} and no manifest.json, so it is not a run; "
                "choose another run_dir"
            )


def refuse_foreign_place(place: Path, names: Collection[str]) -> None:
    """Refuse to make the runs `names` in a directory that holds files of someone else.

    Raises:
        LlmtuneError: with the first of them.
    """
    ours = ("manifest.json", SWEEP_FILE, SEEDS_FILE)
    if not place.is_dir() or any((place / file).exists() for file in ours):
        return
    for child in sorted(place.iterdir()):
        is_run = child.name in names or (child / "manifest.json").exists()
        if not is_run and not child.name.startswith("."):
            raise LlmtuneError(
                f"{place}: holds {child.name!r}, which is not a run; choose another run_dir"
            )


def has_training(run: RunDir) -> bool:
    """Whether training has left an adapter or a checkpoint.

    An opened run that has some was made with the same deciding knobs: `open_ledger` checks it.
    """
    return run.adapter_dir.exists() or (
        run.checkpoints_dir.is_dir() and any(run.checkpoints_dir.iterdir())
    )


def _refuse_other_config(
    run: RunDir, known: Mapping[str, Any], deciding: Mapping[str, Any]
) -> None:
    lines = [
        f"{key}: was {old!r}, is {new!r}" for key, old, new in differences("", known, deciding)
    ]
    if lines:
        raise LlmtuneError(
            f"{run.path}: holds a run of a different config "
            f"({name_first(lines, SHOWN_DIFFERENCES, '; ')}); choose another run_dir, or redo "
            "this one with --force"
        )


def differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys of `new`, below `key`, whose values differ, each with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in new:
            yield from differences(f"{key}.{name}".lstrip("."), old.get(name), new[name])
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(f"{key}.{place}", *pair)
    elif old != new:
        yield key, old, new


def _clear(run: RunDir) -> None:
    for directory in (
        run.adapter_dir,
        run.merged_dir,
        run.checkpoints_dir,
        run.evaluations_dir,
        run.diagnostics_dir,
        run.exports_dir,
    ):
        if directory.is_symlink():  # of a judgment: what it leads to is the user's
            directory.unlink()
        elif directory.exists():
            shutil.rmtree(directory)
    for file in (
        run.manifest_path,
        run.metrics_path,
        run.generations_path,
        run.own_text_path,
        run.report_html_path,
        run.report_json_path,
        run.report_md_path,
    ):
        file.unlink(missing_ok=True)
