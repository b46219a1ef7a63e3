"""A plan counts with the GPUs that a CUDA program would see."""

import subprocess

import pytest

from llmtune.errors import LlmtuneError
from llmtune.planning.devices import find_device

LISTED = """GPU-aaaa1111, 20000, 24000, NVIDIA A
GPU-bbbb2222, 70000, 80000, NVIDIA B, PCIe
GPU-cccc3333, [N/A], [N/A], NVIDIA GB10
"""
MIB = 1 << 20


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    answer = subprocess.CompletedProcess([], 0, stdout=LISTED)
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: answer)


@pytest.mark.parametrize(
    ("visible", "wanted", "name"),
    [
        (None, "auto", "NVIDIA A"),
        (None, "cuda:1", "NVIDIA B, PCIe"),
        ("1", "auto", "NVIDIA B, PCIe"),
        ("1,0", "cuda:1", "NVIDIA A"),
        ("GPU-bbbb", "cuda", "NVIDIA B, PCIe"),
        ("", "auto", "this machine's CPU"),
        ("-1", "auto", "this machine's CPU"),
        ("0,9,1", "cuda:0", "NVIDIA A"),
    ],
)
def test_the_planned_gpu_is_the_one_that_cuda_sees(visible, wanted, name, listed, monkeypatch):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_device(wanted).name == name


def test_a_gpu_that_is_hidden_is_not_planned_for(listed, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,9,1")
    with pytest.raises(LlmtuneError, match="no such GPU"):
        find_device("cuda:1")


def test_a_gpu_without_memory_of_its_own_has_the_machines(listed):
    assert find_device("cuda:0").memory_bytes == 20000 * MIB
    shared = find_device("cuda:2")
    assert shared.kind == "cuda" and shared.memory_bytes > 100 * MIB


def test_a_driver_without_a_gpu_leaves_the_cpu(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout="No devices were found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: answer)
    assert find_device("auto").kind == "cpu"
