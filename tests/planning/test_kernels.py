"""On a CPU compiled kernels are kept until their cache is full; float32 and GPUs keep none."""

import json
from dataclasses import replace

import pytest

from llmtune.planning.estimate import estimate_memory
from llmtune.planning.kernels import (
    CAPACITY,
    CAPACITY_VARIABLE,
    KERNEL_BYTES,
    count_stacks,
    kernel_bytes,
)
from llmtune.planning.shape import read_shape
from tests.planning.shapes import small_config
from tests.planning.test_speed import make_workload

NAME = "compiled kernels"


@pytest.fixture(autouse=True)
def own_capacity(monkeypatch):
    monkeypatch.delenv(CAPACITY_VARIABLE, raising=False)


@pytest.fixture
def shape():
    config = {**small_config("llama"), "model_type": "llama"}
    return read_shape(json.loads(json.dumps(config)), "here")


def test_every_micro_batch_adds_its_products(shape):
    # sizes: q and o 64 x 64, k and v 32 x 64, gate and up 128 x 64, down 64 x 128
    assert kernel_bytes(shape, micro_batches=3, stacks=2) == (3 * 8 * 4 + 5 * 2) * KERNEL_BYTES


def test_a_long_run_fills_the_cache_and_no_more(shape):
    assert kernel_bytes(shape, micro_batches=10_000, stacks=2) == CAPACITY * KERNEL_BYTES
    assert kernel_bytes(shape, micro_batches=None, stacks=2) == CAPACITY * KERNEL_BYTES


def test_a_smaller_cache_is_counted_as_set(shape, monkeypatch):
    monkeypatch.setenv(CAPACITY_VARIABLE, "64")
    assert kernel_bytes(shape, micro_batches=None, stacks=None) == 64 * KERNEL_BYTES


def test_sizes_of_attention_that_come_again_are_counted_once():
    def count(num_tokens, longest, num_lengths):
        return count_stacks(num_tokens, longest=longest, num_lengths=num_lengths, heads=9)

    assert count(1000, 300, 40) == 8
    assert count(10**6, 300, 40) == 3 * 40
    assert count(1000, 100, 40) == 4  # two tiles of nine heads' scores are computed together
    assert count(10**6, 100, 40) == 128
    assert count(None, 300, None) is None


def test_only_16_bit_products_of_a_cpu_keep_kernels():
    work = replace(make_workload("qwen3-0.6b"), steps=5, num_tokens=5000)
    assert estimate_memory(work, "cpu", 2**35).components[NAME] > 0
    assert NAME not in estimate_memory(work, "cuda", 2**35).components
    assert NAME not in estimate_memory(replace(work, element_bytes=4), "cpu", 2**36).components


def test_more_steps_keep_more_up_to_the_cache():
    work = make_workload("qwen3-0.6b")
    sizes = [
        estimate_memory(
            replace(work, steps=steps, num_tokens=steps and 1000 * steps), "cpu", 2**35
        ).components[NAME]
        for steps in (1, 5, 500, None)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[1] < sizes[2] == sizes[3] == CAPACITY * KERNEL_BYTES
