"""Time: operations by hand, and a rate whose source is named."""

import json
from pathlib import Path

import pytest

from llmtune.models.quantization.config import DENSE
from llmtune.planning.activations import Adapted
from llmtune.planning.devices import Device, given_gpu
from llmtune.planning.estimate import Workload
from llmtune.planning.plan import choose_rate, flops_a_token
from llmtune.planning.shape import read_shape
from llmtune.training.memory.arithmetic import RowSizes

SHAPES = Path(__file__).parent.parent.parent / "docs" / "shapes"
CPU = Device("here", "cpu", 2**34)


def make_workload(name):
    shape = read_shape(json.loads((SHAPES / name / "config.json").read_text()), name)
    return Workload(
        shape=shape,
        quantization=DENSE,
        element_bytes=2,
        adapted=Adapted(dict.fromkeys(shape.linear, 16), is_fused=True),
        adapter_parameters=42_000_000,
        optimizer="adamw",
        batch_size=1,
        micro_batch_size="auto",
        checkpointing="auto",
        rows=RowSizes(1024, 1024),
        trained_ratio=1.0,
    )


def test_the_operations_of_an_8b_added_up_by_hand():
    work = make_workload("llama-3.1-8b")
    linear = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    head = 128256 * 4096
    attention = 2 * 1024 * 4096 * 32
    expected = 4 * linear + 4 * head + 3.5 * attention + 6 * 42_000_000
    flops = flops_a_token(work, mean_length=1024, recomputed_layers=0)
    assert flops == pytest.approx(expected)
    again = flops_a_token(work, mean_length=1024, recomputed_layers=16)
    assert again - flops == pytest.approx((2 * linear + attention) / 2)


def write_run(directory, *, device, tokens, created):
    directory.mkdir()
    result = {"tokens": tokens, "seconds": 10.0, "device": device}
    manifest = {
        "format": 1,
        "config": {},
        "created": created,
        "base": {"origin": "/elsewhere/base"},
        "stages": {"train": {"result": result}},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_the_newest_run_on_the_same_base_gives_the_speed(tmp_path):
    write_run(tmp_path / "old", device="cpu", tokens=1000, created="2026-01-01")
    write_run(tmp_path / "new", device="cpu", tokens=4000, created="2026-02-01")
    write_run(tmp_path / "gpu", device="cuda:0", tokens=90_000, created="2026-03-01")
    rate = choose_rate(CPU, base="models/base", runs_dir=tmp_path, measure=False)
    assert rate.tokens_per_second == 400
    assert "measured by new" in rate.source
    other = choose_rate(CPU, base="models/other", runs_dir=tmp_path, measure=False)
    assert other.tokens_per_second is None


def test_an_assumed_rate_says_that_it_is_assumed(tmp_path):
    for device in (CPU, given_gpu("24GB"), given_gpu("h100")):
        rate = choose_rate(device, base="base", runs_dir=tmp_path, measure=False)
        assert rate.source.startswith("assumed: ")
        assert rate.flops > 0


def test_a_rate_can_be_measured_on_this_machine(tmp_path):
    rate = choose_rate(CPU, base="base", runs_dir=tmp_path, measure=True)
    assert "measured just now" in rate.source
    assert rate.flops > 1e8
