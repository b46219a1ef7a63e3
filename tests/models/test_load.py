"""A base is loaded as asked, on one device, and says how it is kept; what cannot be is an error."""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from llmtune.errors import LlmtuneError
from llmtune.models import hardware
from llmtune.models.config import ModelConfig
from llmtune.models.hardware import choose_attention, choose_device, choose_dtype
from llmtune.models.load import load_model
from llmtune.models.quantization.describe import find_dense_weights
from llmtune.models.resolve import resolve_base
from tests.tiny import FAMILIES, make_model

IDS = torch.arange(4, 24)[None]


def load(directory: Path, **knobs):
    config = ModelConfig(base=str(directory), device="cpu", **knobs)
    return load_model(config, resolve_base(config))


@pytest.fixture
def editable(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "base"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_loads_in_the_precision_asked_for(checkpoint, family, dtype):
    loaded = load(checkpoint(family), dtype=dtype)

    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert loaded.quantized.quantized_ratio == 0
    assert not loaded.model.training


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_every_family_loads_quantized_close_to_its_full_precision(checkpoint, family, method):
    full = load(checkpoint(family), dtype="float32")
    quantized = load(checkpoint(family), quantization={"method": method})
    with torch.no_grad():
        expected, found = full.model(IDS).logits, quantized.model(IDS).logits.float()

    assert torch.nn.functional.cosine_similarity(expected, found, dim=-1).mean() > 0.9
    assert quantized.quantized.num_parameters == full.quantized.num_parameters
    assert quantized.quantized.bytes < full.quantized.bytes / 2
    head = full.model.get_output_embeddings().weight
    assert quantized.model.get_output_embeddings().weight.shape == head.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # the latter's layers have biases
def test_weights_dequantized_once_give_the_same_bits(checkpoint, family, dtype):
    model = load(checkpoint(family), quantization={"method": "nf4"}, dtype=dtype).model
    with torch.no_grad():
        expected = [model(IDS).logits, model(IDS[:, :1]).logits]
        dense = find_dense_weights(model)
        dense.hold()
        assert len(dense.layers) == 14
        assert dense.bytes == sum(
            layer.in_features * layer.out_features * getattr(torch, dtype).itemsize
            for layer in dense.layers
        )
        for layer in dense.layers:  # nothing reads them any more
            layer.weight.data = torch.zeros_like(layer.weight.data)
        found = [model(IDS).logits, model(IDS[:, :1]).logits]
    assert all(map(torch.equal, found, expected))


def test_what_is_not_the_product_with_a_dense_weight_is_not_dequantized_once(checkpoint):
    int8 = load(checkpoint(), quantization={"method": "int8"}).model
    other = {"method": "nf4", "compute_dtype": "float32"}
    mixed = load(checkpoint(), quantization=other, dtype="bfloat16").model
    for model in (int8, mixed, load(checkpoint()).model):
        assert find_dense_weights(model).bytes == 0


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("method", ["nf4", "fp4"])
def test_four_bit_knobs_reach_every_layer(checkpoint, method, double_quant):
    knobs = {"method": method, "double_quant": double_quant, "compute_dtype": "float32"}
    layer = load(checkpoint(), quantization=knobs).model.model.layers[0].mlp.up_proj

    assert layer.weight.quant_state.quant_type == method
    assert layer.weight.quant_state.nested is double_quant
    assert layer.compute_dtype == torch.float32


def test_four_bit_computes_in_bfloat16_by_default(checkpoint):
    loaded = load(checkpoint(), quantization={"method": "nf4"})

    assert loaded.model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert loaded.dtype == torch.bfloat16


def test_int8_threshold_reaches_every_layer(checkpoint):
    knobs = {"method": "int8", "outlier_threshold": 3.0}
    loaded = load(checkpoint(), quantization=knobs)

    assert loaded.model.model.layers[0].mlp.up_proj.state.threshold == 3.0


def test_table_says_what_was_quantized_and_what_was_not(checkpoint):
    rows = {r.pattern: r for r in load(checkpoint(), quantization={"method": "nf4"}).quantized.rows}

    up = rows["model.layers.*.mlp.up_proj"]
    assert (up.kind, up.count, up.num_parameters) == ("nf4", 2, 2 * 64 * 128)
    # 4 bits a weight, one byte per 64 for the scale, and one float per 256 scales
    assert up.bytes == 2 * (64 * 128 // 2 + 64 * 128 // 64 + 4)
    assert rows["lm_head"].kind == "bfloat16"
    assert rows["model.embed_tokens"].bytes == 512 * 64 * 2


def test_experts_that_stay_unquantized_are_reported(checkpoint):
    notices = load(checkpoint("mixtral"), quantization={"method": "nf4"}).notices

    assert any("expert weights (68% of the model) stay in torch.bfloat16" in n for n in notices)


def test_attention_in_use_is_reported(checkpoint):
    assert load(checkpoint()).attention == "sdpa"
    assert load(checkpoint(), attention="eager").attention == "eager"


def test_soft_capped_attention_is_computed_by_eager(checkpoint):
    """sdpa leaves the cap out, so a Gemma 2 would compute something else."""
    assert load(checkpoint("gemma2")).attention == "eager"
    capped = {"attn_logit_softcapping": 50.0}
    config = ModelConfig(base="any")
    assert choose_attention(config, torch.device("cpu"), capped) == "eager"
    assert choose_attention(config, torch.device("cpu"), {}) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_gpu_that_is_not_there_is_an_error_and_not_the_cpu(device):
    with pytest.raises(LlmtuneError, match=f"model.device={device}"):
        choose_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cpu_chosen_by_auto_is_said(checkpoint):
    config = ModelConfig(base=str(checkpoint()))
    loaded = load_model(config, resolve_base(config))

    assert loaded.device == torch.device("cpu")
    assert "no GPU was found: the CPU is used" in loaded.notices


@pytest.mark.parametrize("is_emulated", [False, True])
def test_auto_precision_is_what_the_cpu_multiplies_fast(is_emulated, monkeypatch):
    seconds = {torch.float32: 1.0, torch.bfloat16: 20.0 if is_emulated else 1.5}
    monkeypatch.setattr(hardware, "_product_seconds", seconds.__getitem__)
    hardware.cpu_emulates_bfloat16.cache_clear()
    expected = torch.float32 if is_emulated else torch.bfloat16
    assert choose_dtype("auto", torch.device("cpu"), "llama") == expected
    assert choose_dtype("bfloat16", torch.device("cpu"), "llama") == torch.bfloat16
    hardware.cpu_emulates_bfloat16.cache_clear()


def test_products_that_were_held_up_for_a_moment_do_not_change_the_precision(monkeypatch):
    timed = []

    def held_up_at_first(dtype):
        timed.append(dtype)
        return 20.0 if dtype == torch.bfloat16 and len(timed) < 5 else 1.0

    monkeypatch.setattr(hardware, "_product_seconds", held_up_at_first)
    hardware.cpu_emulates_bfloat16.cache_clear()
    assert not hardware.cpu_emulates_bfloat16()
    hardware.cpu_emulates_bfloat16.cache_clear()


def test_more_threads_than_processors_are_named_with_what_to_export(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setenv("GOMP_SPINCOUNT", "300000")
    monkeypatch.setattr(hardware, "_usable_processors", lambda: 8.0)
    for load, free in ((0.2, None), (1.0, None), (4.0, 5), (30.0, 1)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
        said = hardware.why_threads_wait(cpu)
        assert (said is None) if free is None else f"OMP_NUM_THREADS={free} " in said
    monkeypatch.setattr(hardware, "_usable_processors", lambda: 2.0)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0, 0))
    assert "may use 2 processors" in hardware.why_threads_wait(cpu)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # what importing llmtune sets: they soon sleep
    assert hardware.why_threads_wait(cpu) is None
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert hardware.why_threads_wait(cpu) is None


def test_float16_is_refused_for_models_that_overflow_in_it():
    with pytest.raises(LlmtuneError, match="overflow"):
        choose_dtype("float16", torch.device("cpu"), "gemma2")


def test_flash_attention_without_a_gpu_is_refused(checkpoint):
    with pytest.raises(LlmtuneError, match="flash_attention_2 needs a GPU"):
        load(checkpoint(), attention="flash_attention_2")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "mps", "cuda:0,1"])
def test_device_of_unknown_form_is_refused_by_the_config(device):
    with pytest.raises(ValidationError):
        ModelConfig(base="any", device=device)


def test_missing_weight_is_an_error_and_not_random_numbers(editable):
    weights = load_file(editable / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, editable / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlmtuneError, match="missing.*layers.1.mlp.up_proj"):
        load(editable)


@pytest.mark.parametrize("quantization", [None, {"method": "nf4"}, {"method": "int8"}])
def test_weight_of_another_shape_is_an_error(editable, quantization):
    weights = load_file(editable / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 64)
    save_file(weights, editable / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlmtuneError, match="layers.0.mlp.up_proj"):
        load(editable, quantization=quantization)


def test_unknown_architecture_is_named(editable):
    config = json.loads((editable / "config.json").read_text())
    (editable / "config.json").write_text(json.dumps({**config, "model_type": "future"}))
    with pytest.raises(LlmtuneError, match="'future' is unknown"):
        load(editable)


def test_remote_code_is_not_run_unasked(editable):
    config = json.loads((editable / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "evil.Config"}}
    (editable / "config.json").write_text(json.dumps(config))
    (editable / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(LlmtuneError, match="trust_remote_code=true"):
        load(editable)


def test_pickled_weights_load_when_asked_for(editable):
    torch.save(load_file(editable / "model.safetensors"), editable / "pytorch_model.bin")
    with torch.no_grad():
        expected = load(editable).model(IDS).logits
    (editable / "model.safetensors").unlink()
    loaded = load(editable, weights="any")

    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, expected)
    assert len(loaded.fingerprint) == 64


def test_safetensors_are_loaded_before_pickled_weights(editable):
    expected = load(editable).model.lm_head.weight
    assert torch.equal(load(editable, weights="any").model.lm_head.weight, expected)

    zeros = {name: 0 * tensor for name, tensor in load_file(editable / "model.safetensors").items()}
    torch.save(zeros, editable / "pytorch_model.bin")
    assert torch.equal(load(editable, weights="any").model.lm_head.weight, expected)


def test_generation_config_that_cannot_be_saved_is_repaired(editable, tmp_path):
    (editable / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 3})
    )
    loaded = load(editable)
    loaded.model.save_pretrained(tmp_path / "saved")

    assert any("temperature, top_p dropped" in notice for notice in loaded.notices)
    assert (tmp_path / "saved" / "generation_config.json").is_file()


def test_sampling_knobs_of_a_sampling_config_are_kept(editable):
    (editable / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "eos_token_id": 3})
    )
    loaded = load(editable)

    assert loaded.model.generation_config.temperature == 0.6
    assert loaded.model.generation_config.do_sample is True


def test_generation_config_stops_at_every_stop_token(editable):
    (editable / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    loaded = load(editable)

    assert loaded.stop_token_ids == (1, 3)
    assert loaded.model.generation_config.eos_token_id == [1, 3]
    assert loaded.model.generation_config.pad_token_id == loaded.tokenizer.pad_token_id
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id


def test_fingerprint_tells_bases_of_one_shape_apart(checkpoint, editable):
    weights = load_file(editable / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    same = load(editable).fingerprint
    save_file(weights, editable / "model.safetensors", metadata={"format": "pt"})

    assert same == load(checkpoint()).fingerprint
    assert same != load(editable).fingerprint


def test_loading_prints_nothing_of_the_libraries(checkpoint):
    program = (
        "from llmtune.models.config import ModelConfig\n"
        "from llmtune.models.load import load_model\n"
        "from llmtune.models.resolve import resolve_base\n"
        "import torch\n"
        f"for method in ('nf4', 'int8'):\n"
        f"    config = ModelConfig(base={str(checkpoint())!r}, quantization={{'method': method}})\n"
        "    load_model(config, resolve_base(config)).model(torch.arange(4, 24)[None])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert result.stdout + result.stderr == ""


def test_verbosity_of_transformers_is_restored(checkpoint):
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load(checkpoint())

    assert before == (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").filters


def test_four_bit_rows_that_a_cpu_would_get_wrong_are_refused(tmp_path):
    make_model("llama", tmp_path, hidden_size=96, intermediate_size=128, head_dim=16)
    assert load(tmp_path).dtype == torch.bfloat16
    with pytest.raises(LlmtuneError, match="96 inputs, not a multiple of 64"):
        load(tmp_path, quantization={"method": "nf4"})


def test_a_key_that_the_tokenizer_does_not_know_is_not_printed_into_the_output(editable, capfd):
    path = editable / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"][0]["lctrip"] = values["added_tokens"][0].pop("lstrip")
    path.write_text(json.dumps(values))
    with contextlib.suppress(LlmtuneError):
        load(editable)
    assert capfd.readouterr().out == ""
