"""Bases as they come: pickled, already in 4 bits, and cast to another dtype on the way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llmtune.cli import run_command
from llmtune.errors import LlmtuneError
from llmtune.merging.merge import merge_adapter, write_merge
from llmtune.merging.plan import PlanOptions, plan_merge
from llmtune.models.checkpoint import Checkpoint
from tests.merging.adapters import load_adapter, load_base, logits, make_adapter, make_base

ANY = PlanOptions(allow_pickle=True)


def pickle_base(base: Path, num_shards: int) -> None:
    """Turn a safetensors base into the old form, as `torch.save` wrote it."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    if num_shards == 1:
        torch.save(tensors, base / "pytorch_model.bin")
        return
    names = [f"pytorch_model-{i + 1:05}-of-{num_shards:05}.bin" for i in range(num_shards)]
    weight_map = {key: names[i % num_shards] for i, key in enumerate(sorted(tensors))}
    for name in names:
        torch.save({k: v for k, v in tensors.items() if weight_map[k] == name}, base / name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}])
def test_pickled_base_merges_as_its_safetensors_twin(tmp_path, num_shards, options):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16, **options)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "expected")
    pickle_base(base, num_shards)
    with pytest.raises(LlmtuneError, match="pickled"):
        plan_merge(Checkpoint.open(base), adapter)
    write_merge(plan_merge(Checkpoint.open(base), adapter, options=ANY), tmp_path / "merged")
    names = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert len(names) == num_shards and not list((tmp_path / "merged").glob("*.bin"))
    expected = load_base(tmp_path / "expected").state_dict()
    for name, weight in load_base(tmp_path / "merged").state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_pickle_that_would_run_code_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    (base / "model.safetensors").unlink()
    torch.save({"weight": Path("code")}, base / "pytorch_model.bin")
    with pytest.raises(LlmtuneError, match="cannot be read as pickled weights"):
        plan_merge(Checkpoint.open(base), adapter, options=ANY)


def quantize_base(base: Path, **options) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    tokenizer = {path.name: path.read_bytes() for path in base.glob("tokenizer*")}
    shutil.rmtree(base)
    model.save_pretrained(base)
    for name, content in tokenizer.items():
        (base / name).write_bytes(content)


@pytest.mark.parametrize("double_quant", [False, True])
def test_base_stored_in_4_bits_is_dequantized(tmp_path, double_quant):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    quantize_base(
        base,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    result = write_merge(plan_merge(Checkpoint.open(base), adapter), tmp_path / "merged")
    assert result.base == "dequantized"
    assert result.changes == {"lora": 2, "dequantized": 12}
    quantized = AutoModelForCausalLM.from_pretrained(base).dequantize(torch.bfloat16).state_dict()
    deltas = load_file(adapter / "adapter_model.safetensors")
    merged = load_base(tmp_path / "merged")
    assert not hasattr(merged.config, "quantization_config")
    for name, weight in merged.state_dict().items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        expected = quantized[name]
        if f"{key}.lora_A.weight" in deltas:
            a, b = deltas[f"{key}.lora_A.weight"], deltas[f"{key}.lora_B.weight"]
            expected = (expected.float() + 2.0 * (b @ a)).bfloat16()
        assert torch.equal(weight, expected), name


def test_base_stored_in_8_bits_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    path = base / "config.json"
    quantized = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantized}))
    with pytest.raises(LlmtuneError, match=r"already quantized \(bitsandbytes, 8 bits\)"):
        plan_merge(Checkpoint.open(base), adapter)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_merged_model_can_have_another_dtype(tmp_path, dtype):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    write_merge(
        plan_merge(Checkpoint.open(base), adapter, options=PlanOptions(dtype=dtype)),
        tmp_path / "merged",
    )
    merged = load_base(tmp_path / "merged")
    assert {weight.dtype for weight in merged.parameters()} == {getattr(torch, dtype)}
    assert merged.config.dtype == getattr(torch, dtype)
    if dtype == "float32":  # nothing is rounded: the live model in float32 to the last bits
        live = logits(load_adapter(base, adapter, torch.float32))
        torch.testing.assert_close(logits(merged), live, atol=2e-5, rtol=0)


@pytest.fixture
def adapter(tmp_path) -> Path:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    return make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])


def test_dry_run_writes_nothing_and_names_what_changes(adapter, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    command = ["merge", str(adapter), "--out", str(tmp_path / "out"), "--dry-run"]
    assert run_command(command) == 0
    text = capsys.readouterr().out
    assert "2 x model.layers.*.self_attn.q_proj.weight [64 x 64] BF16: lora, rank 4" in text
    assert "17 tensors copied" in text and "nothing was written" in text
    assert run_command([*command, "--json", "--dtype", "float32"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["plans"][0]["bytes"] < planned["needed_bytes"] < planned["free_bytes"]
    assert {one["dtype"] for one in planned["plans"][0]["changed"]} == {"F32"}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("strength", ["nan", "inf", "-1"])
def test_strength_must_be_a_finite_number(adapter, tmp_path, capsys, strength):
    command = ["merge", str(adapter), "--out", str(tmp_path / "out"), f"--strength={strength}"]
    assert run_command(command) == 2
    assert "finite" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "is_checked"),
    [
        ({}, True),
        ({"use_dora": True, "modules_to_save": ["norm"]}, True),
        ({"bias": "all"}, False),
        ({"trainable_token_indices": [5, 17]}, False),
    ],
)
def test_half_of_an_adapter_is_checked_against_the_live_half(tmp_path, capsys, config, is_checked):
    base = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **config)
    out = tmp_path / "out"
    command = ["merge", str(adapter), "--out", str(out), "--strength", "0.5", "--json"]
    assert run_command([*command, "-q"]) == 0
    captured = capsys.readouterr()
    check = json.loads(captured.out)["check"]
    assert (check is not None) == is_checked
    assert check is None or check["kl"] < 1e-5
    verified = run_command(["verify", str(out), "--against", str(adapter), "--json", "-q"])
    assert verified == (0 if is_checked else 2)


def test_nothing_to_dequantize_is_an_error(adapter, tmp_path, capsys):
    command = ["merge", str(adapter), "--out", str(tmp_path / "out"), "--base", "dequantized"]
    assert run_command(command) == 2
    assert "nothing to dequantize" in capsys.readouterr().err


def test_auto_keeps_the_closer_base_and_records_both(adapter, tmp_path, capsys):
    command = ["merge", str(adapter), "model.quantization={method: nf4}", "--base", "auto"]
    assert run_command([*command, "--out", str(tmp_path / "out"), "--json", "-q"]) == 0
    result = json.loads(capsys.readouterr().out)
    scores = result["candidates"]
    assert set(scores) == {"original", "dequantized"} and result["base"] == "dequantized"
    assert scores["dequantized"]["kl"] < scores["original"]["kl"] / 10
    assert {"kl", "top1_agreement", "perplexity"} <= set(scores["original"])
    provenance = json.loads((tmp_path / "out" / "llmtune_merge.json").read_text())
    assert provenance["candidates"] == scores and provenance["base"] == "dequantized"
    assert str(tmp_path) not in json.dumps(provenance)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("form", ["pickled", "4 bits"])
def test_command_merges_and_checks_such_bases(adapter, tmp_path, capsys, form):
    if form == "pickled":
        pickle_base(tmp_path / "base", 1)
    else:
        quantize_base(tmp_path / "base")
    command = ["merge", str(adapter), f"model.base={tmp_path / 'base'}", "model.weights=any"]
    assert run_command([*command, "--out", str(tmp_path / "out"), "--json", "-q"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["base"] == ("original" if form == "pickled" else "dequantized")
    assert result["check"]["kl"] < 1e-2


@pytest.mark.parametrize("stored", ["float32", "float16", "pickled float32"])
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_base_of_more_digits_is_quantized_as_it_was_for_training(
    tmp_path, capsys, stored, method
):
    # Rounded to bfloat16 before it is quantized; what is not quantized stays as it is stored.
    base = make_base(tmp_path / "base", dtype=getattr(torch, stored.split()[-1]))
    adapter = make_adapter(base, tmp_path / "adapter")
    if "pickled" in stored:
        pickle_base(base, 1)
    model = [f"model.quantization={{method: {method}}}", "model.dtype=bfloat16"]
    model += ["model.weights=any", f"model.base={base}"]
    out = str(tmp_path / "out")
    command = ["merge", str(adapter), *model, "--base", "dequantized", "--out", out]
    assert run_command([*command, "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["check"]["kl"] < 1e-6
    command = ["verify", out, *model, "--against", str(adapter), "--max-kl", "1e-6"]
    assert run_command([*command, "--json", "-q"]) == 0


def test_verify_compares_a_dequantized_merge_with_the_quantized_model(adapter, tmp_path, capsys):
    nf4 = "model.quantization={method: nf4}"
    out = str(tmp_path / "out")
    command = ["merge", str(adapter), nf4, "--base", "dequantized", "--out", out, "-q"]
    assert run_command(command) == 0
    capsys.readouterr()
    assert run_command(["verify", out, nf4, "--against", str(adapter), "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] < 1e-2
    # the same weights against the 16-bit base: another model
    assert run_command(["verify", out, nf4, "--against", str(adapter), "--max-kl", "1e-9"]) == 1
