"""A kept quantized base is bit for bit the one quantized anew; a damaged one is never used."""

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtune.io.cached import cache_dir
from llmtune.models import quantized_cache
from llmtune.models.config import ModelConfig
from llmtune.models.load import load_model
from llmtune.models.quantized_cache import keep_quantized
from llmtune.models.resolve import resolve_base
from tests.tiny import FAMILIES

IDS = torch.arange(4, 24)[None]


def load(directory: Path, **knobs):
    values = {"quantization": {"method": "nf4"}, **knobs}
    config = ModelConfig(base=str(directory), device="cpu", **values)
    return load_model(config, resolve_base(config))


def entries() -> list[Path]:
    folder = cache_dir() / "quantized"
    return sorted(folder.iterdir()) if folder.exists() else []


def bits(loaded) -> dict[str, torch.Tensor]:
    """Every stored number of a model: weights, scales, quantization maps, buffers."""
    stored = dict(loaded.model.state_dict()) | dict(loaded.model.named_buffers())
    return {name: value for name, value in stored.items() if isinstance(value, torch.Tensor)}


def assert_same(one, other) -> None:
    first, second = bits(one), bits(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


@pytest.fixture
def editable(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "base"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["nf4", "fp4", "int8"])
def test_a_kept_base_is_bit_for_bit_the_one_quantized_anew(checkpoint, family, method, caplog):
    knobs = {"quantization": {"method": method}}
    anew = load(checkpoint(family), **knobs)
    files = {path: path.stat().st_mtime_ns for path in entries()[0].iterdir()}
    kept = load(checkpoint(family), **knobs)

    assert not caplog.records
    assert {path: path.stat().st_mtime_ns for path in entries()[0].iterdir()} == files
    assert_same(kept, anew)
    assert (kept.quantized, kept.notices, kept.attention) == (
        anew.quantized,
        anew.notices,
        anew.attention,
    )
    assert kept.model.config.to_dict() == anew.model.config.to_dict()
    assert kept.model.generation_config.to_dict() == anew.model.generation_config.to_dict()
    assert kept.model.name_or_path == anew.model.name_or_path
    with torch.no_grad():
        assert torch.equal(kept.model(IDS).logits, anew.model(IDS).logits)


@pytest.mark.parametrize("knobs", [{"double_quant": False}, {"compute_dtype": "float32"}])
def test_the_knobs_of_quantization_survive_the_cache(checkpoint, knobs):
    knobs = {"quantization": {"method": "nf4", **knobs}}
    assert_same(load(checkpoint(), **knobs), load(checkpoint(), **knobs))
    assert len(entries()) == 1


def test_nothing_is_kept_unasked_or_unquantized(checkpoint):
    load(checkpoint(), cache_quantized=False)
    load(checkpoint(), quantization=None)
    assert entries() == []


def test_another_quantization_dtype_or_base_is_another_entry(editable):
    load(editable)
    load(editable, quantization={"method": "fp4"})
    load(editable, dtype="float32")
    weights = load_file(editable / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][50, 50] += 1  # in no sample of the fingerprint
    save_file(weights, editable / "model.safetensors", metadata={"format": "pt"})
    load(editable)
    assert len(entries()) == 4


@pytest.mark.parametrize("damage", ["flip", "cut", "lose", "config"])
def test_a_damaged_entry_is_rewritten_with_one_log_line(checkpoint, damage, caplog):
    anew = load(checkpoint())
    weights = entries()[0] / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "cut":
        weights.write_bytes(whole[: len(whole) // 2])
    elif damage == "lose":
        weights.unlink()
    else:
        (entries()[0] / "config.json").write_text("{}")

    assert_same(load(checkpoint()), anew)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "quantized anew" in caplog.text
    assert weights.read_bytes() == whole
    load(checkpoint())
    assert len(caplog.records) == 1


def test_a_full_disk_leaves_nothing(checkpoint, monkeypatch, caplog):
    """The write fails after some bytes: a file size limit is what a full disk looks like."""
    resource = pytest.importorskip("resource")
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        loaded = load(checkpoint())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)

    assert loaded.quantized.method == "nf4"
    assert entries() == []
    assert "is not kept" in caplog.text


def test_too_little_room_is_seen_before_writing(checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(quantized_cache, "SPARE_FACTOR", 1 << 40)
    load(checkpoint())
    assert entries() == []
    assert "are free in" in caplog.text


def test_two_writers_leave_one_whole_entry(checkpoint, caplog):
    loaded = load(checkpoint())
    entry = entries()[0]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            arguments = (entry, loaded.model, loaded.source.directory, 1)
            list(pool.map(lambda _, given=arguments: keep_quantized(*given), range(2)))
    assert entries() == [entry]
    assert_same(load(checkpoint()), loaded)
    assert "quantized anew" not in caplog.text


def test_the_entries_used_longest_ago_are_forgotten(checkpoint, monkeypatch):
    monkeypatch.setattr(quantized_cache, "KEPT_ENTRIES", 2)
    load(checkpoint())
    first = entries()[0]
    load(checkpoint("qwen2"))
    second = next(entry for entry in entries() if entry != first)
    os.utime(second, (1, 1))
    load(checkpoint("mistral"))
    assert first in entries()
    assert second not in entries()
    assert len(entries()) == 2
