"""Checkpoint headers are read without torch, broken files are named, equal weights hash equal."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmtune.errors import LlmtuneError
from llmtune.io.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointIndex,
    build_preamble,
    fingerprint_checkpoint,
    read_header,
)


def fingerprint(directory: Path) -> str:
    return fingerprint_checkpoint(CheckpointIndex.open(directory))


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(300, 40, generator=generator),
        "a.bias": torch.randn(40, generator=generator).bfloat16(),
        "b.weight": torch.randn(7, 9, generator=generator).half(),
        "steps": torch.tensor(5),
    }


def save_sharded(tensors: dict[str, torch.Tensor], directory: Path) -> Path:
    directory.mkdir()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        file_name = f"model-{number}.safetensors"
        save_file({name: tensor}, directory / file_name)
        weight_map[name] = file_name
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map, "metadata": {}}))
    return directory


def save_single(tensors: dict[str, torch.Tensor], directory: Path) -> Path:
    directory.mkdir()
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    return directory


def test_header_agrees_with_the_safetensors_library(tmp_path):
    save_single(make_tensors(), tmp_path / "m")
    header = read_header(tmp_path / "m" / SINGLE_FILE)
    assert dict(header.metadata) == {"format": "pt"}
    assert header.num_bytes == (tmp_path / "m" / SINGLE_FILE).stat().st_size
    with safe_open(tmp_path / "m" / SINGLE_FILE, "pt") as file:
        assert {entry.name for entry in header.tensors} == set(file.keys())
        for entry in header.tensors:
            stored = file.get_tensor(entry.name)
            assert entry.shape == tuple(stored.shape)
            raw = (tmp_path / "m" / SINGLE_FILE).read_bytes()[entry.start : entry.stop]
            assert raw == bytes(stored.reshape(-1).view(torch.uint8).numpy())


def test_preamble_is_one_that_the_safetensors_library_reads(tmp_path):
    preamble = build_preamble([("x", "F32", (2, 3)), ("y", "BF16", (4,))], {"format": "pt"})
    (tmp_path / "f.safetensors").write_bytes(preamble + bytes(24 + 8))
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.get_tensor("x").shape == (2, 3)
        assert file.get_tensor("y").dtype == torch.bfloat16
        assert file.metadata() == {"format": "pt"}


def test_sharded_checkpoint_lists_every_tensor(tmp_path):
    index = CheckpointIndex.open(save_sharded(make_tensors(), tmp_path / "m"))
    assert len(index.shards) == 4
    assert set(index.tensors) == set(make_tensors())


def test_fingerprint_does_not_depend_on_sharding_or_place(tmp_path):
    single = save_single(make_tensors(), tmp_path / "one")
    sharded = save_sharded(make_tensors(), tmp_path / "two")
    assert fingerprint(single) == fingerprint(sharded)
    moved = tmp_path / "three"
    single.rename(moved)
    assert fingerprint(moved) == fingerprint(sharded)


@pytest.mark.parametrize("change", ["first", "last", "small", "name", "dtype"])
def test_fingerprint_tells_other_weights_apart(tmp_path, change):
    before = fingerprint(save_single(make_tensors(), tmp_path / "one"))
    tensors = make_tensors()
    if change == "first":
        tensors["a.weight"][0, 0] += 1
    elif change == "last":
        tensors["a.weight"][-1, -1] += 1
    elif change == "small":
        tensors["b.weight"][3, 4] += 1
    elif change == "name":
        tensors["c.weight"] = tensors.pop("b.weight")
    else:
        tensors["b.weight"] = tensors["b.weight"].view(torch.bfloat16)
    assert fingerprint(save_single(tensors, tmp_path / "two")) != before


def test_missing_shard_is_named(tmp_path):
    directory = save_sharded(make_tensors(), tmp_path / "m")
    (directory / "model-2.safetensors").unlink()
    with pytest.raises(LlmtuneError, match=r"lacks 1 of the 4 shards .*model-2\.safetensors"):
        CheckpointIndex.open(directory)


def test_truncated_file_is_named_with_both_sizes(tmp_path):
    directory = save_single(make_tensors(), tmp_path / "m")
    whole = (directory / SINGLE_FILE).stat().st_size
    os.truncate(directory / SINGLE_FILE, whole - 10)
    with pytest.raises(LlmtuneError, match=f"cut short.*{whole} bytes.*{whole - 10}"):
        CheckpointIndex.open(directory)


def test_file_with_extra_bytes_is_refused(tmp_path):
    directory = save_single(make_tensors(), tmp_path / "m")
    with (directory / SINGLE_FILE).open("ab") as file:
        file.write(b"more")
    with pytest.raises(LlmtuneError, match="bytes after its last tensor"):
        CheckpointIndex.open(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few"),
        (b"abc", "too few"),
        (struct.pack("<Q", 1 << 40) + b"{}", "is not a safetensors file"),
        (struct.pack("<Q", 100) + b"{}", "cut short"),
        (struct.pack("<Q", 2) + b"{]", "malformed"),
        (struct.pack("<Q", 2) + b"[]", "malformed"),
    ],
)
def test_malformed_header_is_named(tmp_path, content, message):
    path = tmp_path / SINGLE_FILE
    path.write_bytes(content)
    with pytest.raises(LlmtuneError, match=message) as error:
        CheckpointIndex.open(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "info",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [1]},
    ],
)
def test_header_that_contradicts_itself_is_refused(tmp_path, info):
    text = json.dumps({"x": info}).encode()
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(LlmtuneError, match="malformed"):
        CheckpointIndex.open(tmp_path)


def test_index_that_names_the_wrong_shard_is_refused(tmp_path):
    directory = save_sharded(make_tensors(), tmp_path / "m")
    index = json.loads((directory / INDEX_FILE).read_text())
    index["weight_map"]["a.bias"] = "model-0.safetensors"
    (directory / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(LlmtuneError, match=r"'a\.bias' in model-0\.safetensors"):
        CheckpointIndex.open(directory)


def test_index_that_is_no_index_is_refused(tmp_path):
    (tmp_path / INDEX_FILE).write_text("{}")
    with pytest.raises(LlmtuneError, match="weight_map"):
        CheckpointIndex.open(tmp_path)


def test_directory_of_pickles_says_what_to_do(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(LlmtuneError, match="save_pretrained"):
        CheckpointIndex.open(tmp_path)


def test_directory_without_weights_says_what_was_expected(tmp_path):
    with pytest.raises(LlmtuneError, match=SINGLE_FILE):
        CheckpointIndex.open(tmp_path)
    with pytest.raises(LlmtuneError, match="is not a directory"):
        CheckpointIndex.open(tmp_path / "nowhere")
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LlmtuneError, match="an adapter, not a model"):
        CheckpointIndex.open(tmp_path)


def test_reading_headers_and_planning_a_merge_load_no_torch():
    code = "import sys, llmtune.merging.plan; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
