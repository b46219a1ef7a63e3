"""Whenever a merge is killed, what stands there is nothing, or the whole merged model."""

import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from llmtune.errors import LlmtuneError
from llmtune.merging import tiles, tiling
from llmtune.merging.merge import merge_adapter
from tests.merging.adapters import make_adapter, make_base

NUM_KILLS = 10
SECONDS_A_TILE = 0.004


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("made")
    base = make_base(place / "base", dtype=torch.bfloat16, num_hidden_layers=4)
    make_adapter(base, place / "adapter")
    return place


def merge_slowly(made: Path, out_dir: Path) -> None:
    """Merge in many tiles, each after a pause; runs in a process of its own."""
    tiling.TILE_ELEMENTS = 64 * 64
    merge_tile = tiles.TensorMerger.merge_tile

    def slow(self, *tile):
        time.sleep(SECONDS_A_TILE)
        return merge_tile(self, *tile)

    tiles.TensorMerger.merge_tile = slow
    torch.set_num_threads(1)
    merge_adapter(made / "base", made / "adapter", out_dir, num_threads=1)


def start(made: Path, out_dir: Path) -> multiprocessing.Process:
    # a fork: the libraries are loaded already, so that every kill falls into the merge
    process = multiprocessing.get_context("fork").Process(target=merge_slowly, args=(made, out_dir))
    process.start()
    return process


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.name != "llmtune_merge.json"
    }


@pytest.fixture(scope="module")
def whole(made) -> tuple[dict[str, bytes], float]:
    """What a merge that nobody kills leaves, and how long it takes."""
    started = time.monotonic()
    process = start(made, made / "whole")
    process.join(timeout=60)
    assert process.exitcode == 0
    return contents(made / "whole"), time.monotonic() - started


def test_killed_at_ten_random_moments_it_restarts_clean(made, whole, tmp_path):
    expected, seconds = whole
    moments = random.Random(0)
    out, num_unfinished = tmp_path / "out", 0
    for _ in range(NUM_KILLS):
        process = start(made, out)
        time.sleep(moments.uniform(0, seconds))
        os.kill(process.pid, signal.SIGKILL)
        process.join(timeout=10)
        if out.exists():  # the kill came after the rename: then it is whole
            assert contents(out) == expected
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        else:
            num_unfinished += 1
    assert num_unfinished > NUM_KILLS // 2
    merge_adapter(made / "base", made / "adapter", out)
    assert contents(out) == expected
    assert list(tmp_path.iterdir()) == [out]  # nothing is left of the killed ones


def test_killed_while_replacing_it_leaves_the_old_or_the_new_model(made, whole, tmp_path):
    out = tmp_path / "out"
    merge_adapter(made / "base", made / "adapter", out, strength=0.5)
    old = contents(out)
    process = multiprocessing.get_context("fork").Process(
        target=merge_adapter,
        args=(made / "base", made / "adapter", out),
        kwargs={"overwrite": True},
    )
    process.start()
    time.sleep(random.Random(1).uniform(0, 0.1))
    process.kill()
    process.join(timeout=10)
    if out.exists():
        assert contents(out) in (old, whole[0])
    merge_adapter(made / "base", made / "adapter", out, overwrite=True)
    assert contents(out) == whole[0]
    assert list(tmp_path.iterdir()) == [out]


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
        subprocess.run(["umount", str(small)], check=True)


def test_disk_that_fills_on_the_way_is_an_error_and_stays_empty(made, tmp_path, monkeypatch):
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        # as if another program took the space after the check
        monkeypatch.setattr("llmtune.unfinished.free_bytes", lambda _: 1 << 40)
        with pytest.raises(LlmtuneError, match="ran full.*nothing was left"):
            merge_adapter(made / "base", made / "adapter", small / "out")
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)
