"""A base that is quantized is read tensor by tensor: the same numbers, and no file stays mapped."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune.errors import LlmtuneError
from llmtune.models.build import stored_tensors
from llmtune.models.config import ModelConfig
from llmtune.models.load import load_model
from llmtune.models.resolve import resolve_base
from tests.tiny import FAMILIES, make_model


def load(directory, **knobs):
    config = ModelConfig(base=str(directory), device="cpu", cache_quantized=False, **knobs)
    return config, load_model(config, resolve_base(config)).model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_quantized_base_is_the_one_that_transformers_loads(checkpoint, family):
    config, ours = load(checkpoint(family), quantization={"method": "nf4"})
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint(family),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=config.storage.loading_config(torch.bfloat16),
    )
    expected = dict(theirs.state_dict()) | dict(theirs.named_buffers())
    found = dict(ours.state_dict()) | dict(ours.named_buffers())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
    assert ours.name_or_path == theirs.name_or_path
    assert ours.generation_config.bos_token_id == theirs.generation_config.bos_token_id


def test_a_base_without_generation_config_gets_the_one_of_its_config(tmp_path):
    make_model("llama", tmp_path)
    (tmp_path / "generation_config.json").unlink()
    _, ours = load(tmp_path, quantization={"method": "nf4"})
    _, theirs = load(tmp_path)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_shard_of_a_quantized_base_stays_mapped(tmp_path):
    make_model("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    make_model("llama", tmp_path / "whole")
    for file in (tmp_path / "whole").glob("token*"):
        file.rename(tmp_path / file.name)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    _, quantized = load(tmp_path, quantization={"method": "nf4"})
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    _, mapped = load(tmp_path, dtype="float32")
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert quantized.num_parameters() == mapped.num_parameters()


def test_every_dtype_comes_back_as_it_was_written(tmp_path):
    written = {
        str(dtype): torch.arange(-3, 9).reshape(3, 4).to(dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)
    }
    written |= {"scalar": torch.tensor(3.5), "none": torch.empty(0, 4), "bool": torch.eye(3) > 0}
    save_file(written, tmp_path / "model.safetensors")
    read = stored_tensors(tmp_path)
    assert read.keys() == written.keys()
    for name, value in written.items():
        assert read[name].get_shape() == list(value.shape)
        assert torch.equal(read[name][...], value)
        assert read[name][...].dtype == value.dtype


def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path):
    save_file({"weight": torch.zeros(64, 64)}, tmp_path / "model.safetensors")
    tensors = stored_tensors(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(LlmtuneError, match="cut short: weight ends at byte"):
        tensors["weight"][...]


def test_a_dtype_without_a_counterpart_is_left_to_the_library(tmp_path):
    save_file({"weight": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")["weight"].dtype == torch.float8_e4m3fn
    assert stored_tensors(tmp_path) is None
