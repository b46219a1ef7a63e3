"""A plan counts with the GPUs that a CUDA program would see."""

import subprocess

import pytest

from llmtune.errors import LlmtuneError
from llmtune.planning.devices import find_device

LISTED = """GPU-aaaa1111, 20000, 24000, NVIDIA A
GPU-bbbb2222, 70000, 80000, NVIDIA B, PCIe
GPU-cccc3333, [N/A], [N/A], NVIDIA GB10
"""
SLICES = """GPU 0: NVIDIA A (UUID: GPU-aaaa1111)
GPU 1: NVIDIA B, PCIe (UUID: GPU-bbbb2222)
  MIG 3g.40gb     Device  0: (UUID: MIG-dddd4444-55)
  MIG 1c.1g.10gb+me  Device  1: (UUID: MIG-GPU-bbbb2222/5/0)
"""
MIB = 1 << 20


@pytest.fixture
def listed(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def answer(command, **_options):
        return subprocess.CompletedProcess([], 0, stdout=SLICES if "-L" in command else LISTED)

    monkeypatch.setattr(subprocess, "run", answer)


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
        ("MIG-dddd", "auto", "a slice of 40 GB of a GPU"),
        ("MIG-GPU-bbbb2222/5/0,MIG-dddd", "auto", "a slice of 10 GB of a GPU"),
        ("MIG-gone", "auto", "this machine's CPU"),
    ],
)
def test_the_planned_gpu_is_the_one_that_cuda_sees(visible, wanted, name, listed, monkeypatch):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_device(wanted).name == name


@pytest.mark.parametrize("visible", ["0,9,1", "MIG-dddd,MIG-GPU-bbbb"])
def test_a_gpu_that_is_hidden_is_not_planned_for(listed, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(LlmtuneError, match="no such GPU"):
        find_device("cuda:1")


def test_a_slice_of_a_gpu_has_the_memory_of_its_profile(listed, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-dddd4444-55")
    assert find_device("auto").memory_bytes == 40 << 30


def test_a_gpu_without_memory_of_its_own_has_the_machines(listed):
    assert find_device("cuda:0").memory_bytes == 20000 * MIB
    shared = find_device("cuda:2")
    assert shared.kind == "cuda" and shared.memory_bytes > 100 * MIB


def test_a_driver_without_a_gpu_leaves_the_cpu(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout="No devices were found\n")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_options: answer)
    assert find_device("auto").kind == "cpu"
