"""Checkpoints that are whole or absent, carry what they belong to, and are checked before use."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmtune.adapters.live import live_method
from llmtune.adapters.manifest import CONFIG_NAME, WEIGHTS_NAME
from llmtune.adapters.saved import settle_config
from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import hash_file
from llmtune.io.json_files import read_json_object
from llmtune.training.objectives.base import OpenSums
from llmtune.training.request import RunTotals, Start

PREFIX = "checkpoint-"
WRITING_PREFIX = ".writing-"
CHECKSUMS_NAME = "checksums.json"
PROGRESS_NAME = "llmtune.json"
STATE_NAME = "adapter_steps.safetensors"
"""What the adapter's method has kept of the steps so far, if anything."""


class DamagedCheckpointError(Exception):
    """A checkpoint's files are not the ones that were written; the message says how."""


def checkpoint_dir(checkpoints_dir: Path, step: int) -> Path:
    """Return where the checkpoint of `step` is."""
    return checkpoints_dir / f"{PREFIX}{step}"


def write_checkpoint(target_dir: Path, write_files: Callable[[Path], None]) -> None:
    """Write a checkpoint that appears under its name only when every byte of it is on disk.

    Args:
        target_dir: the checkpoint's directory; an older one of that name is replaced.
        write_files: writes the files into the directory it is given.

    Raises:
        LlmtuneError: the disk is full or not writable. Earlier checkpoints are untouched.
    """
    parent = target_dir.parent
    temporary: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=WRITING_PREFIX, dir=parent))
        write_files(temporary)
        _write_checksums(temporary)
        if target_dir.exists():
            replaced = temporary.with_name(f"{temporary.name}-replaced")
            target_dir.rename(replaced)
            temporary.rename(target_dir)
            shutil.rmtree(replaced)
        else:
            temporary.rename(target_dir)
        _sync(parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if not _is_disk_error(error):
            raise
        free = shutil.disk_usage(_existing_parent(parent)).free
        # torch and safetensors report a full disk in their own words, without an error number
        reason = getattr(error, "strerror", None) or "a file could not be written to its end"
        raise LlmtuneError(
            f"could not write the checkpoint {target_dir}: {reason}. {free:,} bytes are free "
            "there. Earlier checkpoints are kept: make room (or choose another run_dir) and run "
            "the same command again to continue from the newest one."
        ) from error


def _is_disk_error(error: Exception) -> bool:
    """Tell a file that could not be written from any other failure, by what the writers say.

    torch's archive writer and safetensors report a full disk in their own words.
    """
    if isinstance(error, OSError):
        return True
    marks = ("PytorchStreamWriter", "inline_container", "unexpected pos", "os error", "I/O error")
    return any(mark in str(error) for mark in marks)


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, newest step first, whether whole or damaged."""
    if not checkpoints_dir.is_dir():
        return []
    found = [
        path
        for path in checkpoints_dir.iterdir()
        if path.name.startswith(PREFIX) and path.name.removeprefix(PREFIX).isdigit()
    ]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step a checkpoint was saved after."""
    return int(checkpoint.name.removeprefix(PREFIX))


def check_files(checkpoint: Path) -> None:
    """Check that every file has the size and hash it was written with, and that none was added.

    Raises:
        DamagedCheckpointError: says which file differs and how.
    """
    try:
        expected = read_json_object(checkpoint / CHECKSUMS_NAME)["files"]
    except (LlmtuneError, KeyError) as error:
        raise DamagedCheckpointError(f"{CHECKSUMS_NAME} cannot be read") from error
    present = {path.name for path in checkpoint.iterdir()} - {CHECKSUMS_NAME}
    if present != set(expected):
        missing = ", ".join(sorted(set(expected) - present))
        raise DamagedCheckpointError(
            f"{missing} missing" if missing else f"unknown files {sorted(present - set(expected))}"
        )
    for name, record in expected.items():
        size = (checkpoint / name).stat().st_size
        if size != record["bytes"]:
            raise DamagedCheckpointError(f"{name} has {size} bytes of {record['bytes']}")
        if hash_file(checkpoint / name) != record["sha256"]:
            raise DamagedCheckpointError(f"{name} differs from what was written")


def find_checkpoint(
    checkpoints_dir: Path, identity: Mapping[str, str], say: Callable[[str], None]
) -> Path | None:
    """Return the newest whole checkpoint, or None if there is none.

    Args:
        checkpoints_dir: where the run keeps its checkpoints.
        identity: what the run is made of, name to hash; must equal what the checkpoint recorded.
        say: called for every damaged checkpoint that is passed over, and if none is whole.

    Raises:
        LlmtuneError: the checkpoint belongs to other data, a different base or config.
    """
    remove_unfinished(checkpoints_dir)
    found = list_checkpoints(checkpoints_dir)
    for checkpoint in found:
        try:
            check_files(checkpoint)
        except DamagedCheckpointError as error:
            say(f"{checkpoint} is damaged ({error}), so it is passed over")
            continue
        _check_identity(checkpoint, identity)
        return checkpoint
    if found:
        say(f"{checkpoints_dir} holds no whole checkpoint: training starts over at step 0")
    return None


def find_start(
    checkpoints_dir: Path,
    identity: Mapping[str, str],
    model: PeftModel,
    *,
    total_steps: int,
    say: Callable[[str], None],
) -> Start:
    """Find what an earlier call left, and load the adapter from it.

    Args:
        checkpoints_dir: where the run keeps its checkpoints.
        identity: what the run is made of, name to hash.
        model: gets the checkpoint's weights.
        total_steps: of the run.
        say: shows a line to the user.

    Raises:
        LlmtuneError: the checkpoint belongs to other data, a different base or config.
    """
    checkpoint = find_checkpoint(checkpoints_dir, identity, say)
    if checkpoint is None:
        return Start(None, 0, total_steps, RunTotals(), identity)
    load_weights(model, checkpoint)
    totals = RunTotals(**read_progress(checkpoint)["totals"])
    steps = step_of(checkpoint)
    say(f"continuing after step {steps} of {total_steps}")
    return Start(checkpoint, steps, total_steps, totals, identity)


class OpenWindow(TypedDict):
    """The sums over the steps since the last line of metrics."""

    loss: float
    logged_step: int
    metrics: Mapping[str, OpenSums]


class Progress(TypedDict, total=False):
    """What a checkpoint records of the run; older versions wrote no `window`."""

    identity: Mapping[str, Any]
    totals: Mapping[str, Any]
    """The fields of `RunTotals`."""
    choices: Mapping[str, str]
    window: OpenWindow


def read_progress(checkpoint: Path) -> Progress:
    """Return what a checkpoint recorded of the run: identity, totals, best evaluation."""
    return cast(Progress, read_json_object(checkpoint / PROGRESS_NAME))


def remove_old_checkpoints(newest: Path, *, keep: int, best_step: int | None) -> None:
    """Delete all but the `keep` newest checkpoints, of which `newest` is the last, and the best.

    Those of later steps go too: they are damaged ones that the run passed over when it began, and
    would otherwise be kept in the place of whole ones.
    """
    found = list_checkpoints(newest.parent)
    later = [checkpoint for checkpoint in found if step_of(checkpoint) > step_of(newest)]
    earlier = [checkpoint for checkpoint in found if checkpoint not in later]
    for checkpoint in [*later, *earlier[keep:]]:
        if checkpoint in later or step_of(checkpoint) != best_step:
            shutil.rmtree(checkpoint)


def remove_all_checkpoints(checkpoints_dir: Path) -> None:
    """Delete every checkpoint: the run starts over."""
    remove_unfinished(checkpoints_dir)
    for checkpoint in list_checkpoints(checkpoints_dir):
        shutil.rmtree(checkpoint)


def remove_unfinished(checkpoints_dir: Path) -> None:
    """Delete what a killed run left half-written."""
    if checkpoints_dir.is_dir():
        for path in checkpoints_dir.glob(f"{WRITING_PREFIX}*"):
            shutil.rmtree(path)


def _check_identity(checkpoint: Path, identity: Mapping[str, str]) -> None:
    recorded = read_progress(checkpoint)["identity"]
    different = sorted(
        name for name in {*recorded, *identity} if recorded.get(name) != identity.get(name)
    )
    if different:
        raise LlmtuneError(
            f"{checkpoint} was made with a different {' and a different '.join(different)} than "
            "this run has, so it cannot be continued. Give the run a different run_dir, restore "
            "what was changed, or start over with train.resume=never (it deletes the checkpoints)."
        )


def _write_checksums(directory: Path) -> None:
    files = {}
    for path in sorted(directory.iterdir()):
        _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    checksums = directory / CHECKSUMS_NAME
    checksums.write_text(json.dumps({"files": files}, indent=2), encoding="utf-8")
    _sync(checksums)
    _sync(directory)


def _sync(path: Path) -> None:
    """Have the disk hold a file, or a directory's names, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some filesystems refuse to sync a directory; its files are synced all the same.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def save_weights(model: PeftModel, directory: Path) -> None:
    """Write the adapter in stock PEFT's format, without asking the hub about the base."""
    state = {name: tensor.contiguous().cpu() for name, tensor in _state(model).items()}
    save_file(state, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    steps = {key: value.cpu() for key, value in live_method(model).step_state(model).items()}
    if steps:
        save_file(steps, directory / STATE_NAME)
    model.peft_config[model.active_adapter].save_pretrained(str(directory))
    settle_config(directory / CONFIG_NAME)


def load_weights(model: PeftModel, directory: Path) -> None:
    """Read the adapter's tensors back into the model; every tensor must have its place.

    Raises:
        LlmtuneError: the file holds other tensors than the model's adapter.
    """
    state = load_file(directory / WEIGHTS_NAME)
    expected = _state(model)
    different = sorted(
        name
        for name in {*state, *expected}
        if name not in state or name not in expected or state[name].shape != expected[name].shape
    )
    if different:
        raise LlmtuneError(
            f"{directory / WEIGHTS_NAME} does not fit the adapter: {len(different)} tensors "
            f"differ, the first is {different[0]}. It was made with a different adapter section; "
            "use another run_dir, or train.resume=never to start over."
        )
    set_peft_model_state_dict(model, state, adapter_name=model.active_adapter)
    steps = directory / STATE_NAME
    live_method(model).restore_step_state(model, load_file(steps) if steps.is_file() else {})


@torch.no_grad()
def check_finite(model: PeftModel, step: int) -> None:
    """Refuse to save weights that are not finite.

    Raises:
        LlmtuneError: some trained tensor holds a NaN or an infinity.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    finite = torch.stack([p.isfinite().all() for _, p in trained]).tolist()
    broken = [name for (name, _), is_finite in zip(trained, finite, strict=True) if not is_finite]
    if broken:
        raise LlmtuneError(
            f"after step {step} {len(broken)} trained tensors hold NaN or infinity (the first is "
            f"{broken[0]}), so nothing was saved; earlier checkpoints are kept. Lower "
            "train.learning_rate, or check model.dtype."
        )


def _state(model: PeftModel) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, adapter_name=model.active_adapter, save_embedding_layers=False
    )
    return state
