"""Whenever a merge is killed, what stands there is nothing, or the whole merged model."""

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtune.errors import LlmtuneError
from llmtune.merging import changes, tiles
from llmtune.merging.merge import merge_adapter
from tests.merging.adapters import make_adapter, make_base

NUM_KILLS = 10
FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("made")
    base = make_base(place / "base", dtype=torch.bfloat16, num_hidden_layers=4)
    make_adapter(base, place / "adapter")
    return place


def merge_until(made: Path, out_dir: Path, fatal: int, reached, options: dict) -> None:
    """Merge in many tiles, and die at moment `fatal`; runs in a process of its own.

    A moment is a tile, or a call that opens, makes, renames or removes a file: told by their
    number, and not by a clock, the kills fall on the same places on every machine.
    """
    changes.TILE_ELEMENTS = 64 * 64
    merge_tile = tiles.TensorMerger.merge_tile
    moments = itertools.count(1)

    def pass_moment() -> None:
        reached.value = moment = next(moments)
        if moment == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, *tile):
        pass_moment()
        return merge_tile(self, *tile)

    tiles.TensorMerger.merge_tile = counted
    torch.set_num_threads(1)
    sys.addaudithook(lambda event, _: event.startswith(FILE_EVENTS) and pass_moment())
    merge_adapter(made / "base", made / "adapter", out_dir, num_threads=1, **options)


def run(made: Path, out_dir: Path, fatal: int = 0, **options) -> int:
    """Merge in a process that dies at moment `fatal`; return the moments it had."""
    # a fork: the libraries are loaded already, so that every kill falls into the merge
    context = multiprocessing.get_context("fork")
    reached = context.RawValue("i", 0)
    process = context.Process(target=merge_until, args=(made, out_dir, fatal, reached, options))
    process.start()
    process.join(timeout=600)
    assert process.exitcode == 0 or (fatal and process.exitcode == -signal.SIGKILL)
    return reached.value


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.name != "llmtune_merge.json"
    }


@pytest.fixture(scope="module")
def whole(made) -> dict[str, bytes]:
    """What a merge that nobody kills leaves; what is loaded on first use is loaded after it."""
    merge_adapter(made / "base", made / "adapter", made / "whole")
    return contents(made / "whole")


def test_killed_at_ten_moments_it_restarts_clean(made, whole, tmp_path):
    moments = run(made, tmp_path / "out")
    assert moments > 10 * NUM_KILLS
    num_unfinished = 0
    # Three lie around the rename at the end, the others are spread over the whole merge.
    spread = [1 + moments * kill // NUM_KILLS for kill in range(NUM_KILLS - 3)]
    for fatal in (*spread, moments - 4, moments - 2, moments):
        place = tmp_path / str(fatal)
        run(made, place / "out", fatal)
        if (place / "out").exists():  # the kill came after the rename: then it is whole
            assert contents(place / "out") == whole
        else:
            num_unfinished += 1
        merge_adapter(made / "base", made / "adapter", place / "out", overwrite=True)
        assert contents(place / "out") == whole
        assert list(place.iterdir()) == [place / "out"]  # nothing is left of the killed one
    assert num_unfinished > NUM_KILLS // 2


def test_killed_while_replacing_it_leaves_the_old_or_the_new_model(made, whole, tmp_path):
    merge_adapter(made / "base", made / "adapter", tmp_path / "old", strength=0.5)
    old, found = contents(tmp_path / "old"), []
    shutil.copytree(tmp_path / "old", tmp_path / "out")
    moments = run(made, tmp_path / "out", overwrite=True)
    for fatal in (moments // 2, *range(moments - 12, moments + 1, 2)):
        place = tmp_path / str(fatal)
        shutil.copytree(tmp_path / "old", place / "out")
        run(made, place / "out", fatal, overwrite=True)
        if (place / "out").exists():
            found.append(contents(place / "out"))
            assert found[-1] in (old, whole)
        merge_adapter(made / "base", made / "adapter", place / "out", overwrite=True)
        assert contents(place / "out") == whole
        assert list(place.iterdir()) == [place / "out"]
    assert old in found and whole in found


def test_disk_of_a_few_kilobytes_is_an_error_and_stays_empty(made, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        with pytest.raises(LlmtuneError, match=r"needs [\d,]+ bytes and its disk has"):
            merge_adapter(made / "base", made / "adapter", small / "out")
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_disk_that_fills_on_the_way_is_an_error_and_stays_empty(made, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        # as if another program took the space after the check
        monkeypatch.setattr("llmtune.io.unfinished.free_bytes", lambda _: 1 << 40)
        with pytest.raises(LlmtuneError, match="ran full.*nothing was left"):
            merge_adapter(made / "base", made / "adapter", small / "out")
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
