"""On a CPU compiled kernels take memory until a run is long; float32 and GPUs keep none."""

import json
from dataclasses import replace

import pytest

from llmtune.io.native_libraries import CAPACITY, VARIABLES
from llmtune.planning.activations import KERNEL_BYTES, PLACES, count_sizes, kernel_bytes
from llmtune.planning.estimate import estimate_memory
from llmtune.planning.shape import read_shape
from llmtune.training.memory.arithmetic import RowSizes
from tests.planning.shapes import small_config
from tests.planning.test_speed import make_workload

NAME = "compiled kernels"


@pytest.fixture(autouse=True)
def own_capacity(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(VARIABLES[0], str(CAPACITY))


@pytest.fixture
def shape():
    config = {**small_config("llama"), "model_type": "llama"}
    return read_shape(json.loads(json.dumps(config)), "here")


def count(num_sizes=42, *, micro_batches, num_lengths=40):
    """Return the kernels kept and those dropped."""
    taken = kernel_bytes(num_sizes, micro_batches=micro_batches, num_lengths=num_lengths)
    return tuple(size // KERNEL_BYTES for size in taken)


def test_a_micro_batch_has_the_products_of_its_linears_and_of_its_attention(shape):
    # sizes: q and o 64 x 64, k and v 32 x 64, gate and up 128 x 64, down 64 x 128
    assert count_sizes(shape, 200, longest=200) == 8 * 4 + 5 * 2
    assert count_sizes(shape, 1024, longest=1024) == 8 * 4 + 5 * 8


def test_tiles_of_short_rows_are_computed_together(shape):
    # of four heads' scores, 256 KiB a tile
    assert count_sizes(shape, 1024, longest=128) == 8 * 4 + 5 * 2


def test_every_micro_batch_adds_its_products():
    assert count(micro_batches=3) == (3 * 42, 0)


def test_rows_of_one_length_need_the_same_products_again():
    assert count(micro_batches=3, num_lengths=1) == (42, 0)


def test_what_the_cache_drops_stays_in_the_heap_up_to_a_number_of_places():
    assert count(micro_batches=10) == (CAPACITY, 420 - CAPACITY)
    assert count(micro_batches=10_000) == (CAPACITY, PLACES)
    assert count(micro_batches=None) == (CAPACITY, PLACES)


@pytest.mark.parametrize("name", VARIABLES)
def test_the_users_own_cache_is_counted_as_set(monkeypatch, name):
    for each in VARIABLES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "64")
    assert count(micro_batches=None) == (64, PLACES)


def test_only_16_bit_products_of_a_cpu_keep_kernels():
    work = replace(make_workload("qwen3-0.6b"), steps=5, num_tokens=5000)
    assert estimate_memory(work, "cpu", 2**35).components[NAME] > 0
    assert NAME not in estimate_memory(work, "cuda", 2**35).components
    assert NAME not in estimate_memory(replace(work, element_bytes=4), "cpu", 2**36).components


def test_more_steps_take_more_until_every_place_is_taken():
    work = make_workload("qwen3-0.6b")
    estimates = [
        estimate_memory(
            replace(work, steps=steps, num_tokens=steps and 1000 * steps), "cpu", 2**35
        ).components
        for steps in (1, 5, 500, None)
    ]
    taken = [each[NAME] + each.get("dropped kernels", 0) for each in estimates]
    assert taken == sorted(taken)
    assert taken[0] < taken[1] < taken[2] == taken[3]


def test_the_holes_of_dropped_kernels_have_no_workspace_of_their_own():
    work = make_workload("qwen3-0.6b")
    short, long = (
        estimate_memory(replace(work, steps=steps, num_tokens=steps * 1000), "cpu", 2**35)
        for steps in (5, 500)
    )
    assert short.components[NAME] == long.components[NAME]
    assert short.components["workspace"] == long.components["workspace"]


def test_a_micro_batch_of_more_products_than_are_kept_is_told_how_to_keep_them():
    def notice(tokens, device="cpu", element_bytes=2):
        rows = RowSizes(tokens, tokens)
        work = replace(make_workload("qwen3-0.6b"), rows=rows, element_bytes=element_bytes)
        return estimate_memory(work, device, 2**40).notice

    assert notice(2048) is None
    # five sizes of linears, 64 tiles of attention
    assert f"{5 * 8 + 64 * 5} different matrix products" in notice(8192)
    assert notice(8192).endswith(f"{VARIABLES[0]}=512")
    assert notice(8192, device="cuda") is notice(8192, element_bytes=4) is None
