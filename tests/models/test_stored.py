"""A quantized checkpoint becomes the dense one that its own library reads, once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune.cli import run_command
from llmtune.errors import LlmtuneError
from llmtune.models import dequantized
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import ModelConfig
from llmtune.models.dequantized import dequantize, plan_dequantization
from llmtune.models.load import load_model
from llmtune.models.resolve import resolve_base
from tests.quantized import PACKERS, store_experts, store_quantized
from tests.tiny import make_model

EXAMPLES = sorted((Path(__file__).parent / "stored").glob("*.safetensors"))
"""What the libraries packed and read back; `stored/make_examples.py` made them."""
ANSWERED = sorted((Path(__file__).parent / "stored" / "logits").glob("*.safetensors"))
"""Models and what the libraries answer from them; `stored/make_logits.py` made them."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def unpack_example(example: Path, directory: Path) -> tuple[Path, torch.Tensor]:
    """Lay an example out as a checkpoint; return its directory and its dense weight."""
    with safe_open(example, "pt") as file:
        about = file.metadata()
    tensors = load_file(example)
    expected = tensors.pop("expected")
    stored = {name.removeprefix("stored/"): tensor for name, tensor in tensors.items()}
    directory.mkdir()
    save_file(stored, directory / "model.safetensors", about)
    config = {
        "model_type": "llama",
        "torch_dtype": about.get("dtype", "bfloat16"),
        "quantization_config": json.loads(about["quantization_config"]),
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory, expected


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_dense_weight_is_the_one_that_the_library_reads(example, tmp_path):
    directory, expected = unpack_example(example, tmp_path / "stored")
    plan = plan_dequantization(Checkpoint.open(directory))
    assert plan is not None
    dense = load_file(dequantize(plan).directory / "model.safetensors")

    assert list(dense) == ["proj.weight"]
    assert dense["proj.weight"].dtype == expected.dtype
    torch.testing.assert_close(dense["proj.weight"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("example", ANSWERED, ids=lambda path: path.stem)
def test_the_dense_base_answers_as_the_library_does(example, tmp_path):
    """A whole model, quantized; the dense weights are float16, the library's are not rounded."""
    with safe_open(example, "pt") as file:
        about = file.metadata()
    tensors = load_file(example)
    expected = tensors.pop("logits")
    stored = {name.removeprefix("stored/"): tensor for name, tensor in tensors.items()}
    directory = tmp_path / "stored"
    directory.mkdir()
    config, ids = about.pop("config"), json.loads(about.pop("ids"))
    save_file(stored, directory / "model.safetensors", about)
    (directory / "config.json").write_text(config)

    plan = plan_dequantization(Checkpoint.open(directory))
    assert plan is not None
    dense = dequantize(plan).directory
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)


def test_every_format_has_answers_of_its_library():
    assert {path.stem for path in ANSWERED} == {*PACKERS, "mxfp4"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny checkpoint in 16 bits."""
    directory = tmp_path_factory.mktemp("plain") / "base"
    make_model("llama", directory, dtype=torch.bfloat16)
    return directory


@pytest.fixture
def base(plain, tmp_path):
    """The same to be stored quantized."""
    return Path(shutil.copytree(plain, tmp_path / "base"))


@pytest.mark.parametrize("method", PACKERS)
def test_model_in_each_format_loads_with_its_dense_weights(base, method):
    dense = store_quantized(base, method)
    config = ModelConfig(base=str(base), dtype="float32")
    live = load_model(config, resolve_base(config))
    state = live.model.state_dict()

    for name, weight in dense.items():
        torch.testing.assert_close(state[name], weight.bfloat16().float(), rtol=0, atol=0)
    untouched = "model.embed_tokens.weight"
    assert torch.equal(state[untouched], load_file(base / "model.safetensors")[untouched].float())
    assert live.notices[0].startswith(f"base: {method}")
    assert live.notices[0].endswith("dequantized to bfloat16")
    assert len(dense) == 14


def test_experts_in_mxfp4_load_as_transformers_reads_them(tmp_path):
    base = tmp_path / "base"
    make_model("gpt_oss", base, dtype=torch.bfloat16, num_local_experts=4, num_experts_per_tok=2)
    dense = store_experts(base)
    config = ModelConfig(base=str(base), dtype="float32")
    state = load_model(config, resolve_base(config)).model.state_dict()

    assert len(dense) == 4
    for name, weight in dense.items():
        torch.testing.assert_close(state[name], weight.bfloat16().float(), rtol=0, atol=0)


def test_dense_checkpoint_is_made_once_and_records_its_source(base, cache, monkeypatch):
    store_quantized(base, "gptq")
    config = ModelConfig(base=str(base))
    first = resolve_base(config)
    monkeypatch.setattr(dequantized, "_write", lambda *args: pytest.fail("made again"))

    assert resolve_base(config).directory == first.directory == next((cache / "bases").iterdir())
    assert first.as_record()["stored"] == "gptq 4-bit, dequantized to bfloat16"
    assert first.as_record()["stored_fingerprint"] == Checkpoint.open(base).fingerprint
    assert "quantization_config" not in json.loads((first.directory / "config.json").read_text())


def test_what_bitsandbytes_stored_stays_so_if_it_may(base):
    store_quantized(base, "bitsandbytes")
    config = ModelConfig(base=str(base))

    assert resolve_base(config, allow_quantized=True).directory == base
    assert resolve_base(config).directory != base


DAMAGES = {
    "gptq": (
        "scales",
        lambda part: part[:1],
        r"q_proj.scales is F16 \[1, 64\]; expected .*\[2, 64",
    ),
    "awq": ("qzeros", None, "q_proj.qzeros is missing"),
    "fp8": ("weight_scale_inv", lambda part: part[:, :0], "which does not fit"),
    "compressed-tensors": ("weight_shape", lambda part: part + 8, "holds no"),
    "hqq": ("W_q", lambda part: part[:1], "expected U8"),
    "torchao": ("_weight_scale", lambda part: part[:3], "expected F32"),
    "bitsandbytes": ("SCB", lambda part: part / 0, "is not finite"),
}
"""By format: the part that is damaged, how (None takes it away), and what is said."""


@pytest.mark.parametrize("method", PACKERS)
def test_damaged_checkpoint_is_one_line_and_leaves_nothing(base, cache, method):
    store_quantized(base, method)
    part, damage, message = DAMAGES[method]
    tensors = load_file(base / "model.safetensors")
    with safe_open(base / "model.safetensors", "pt") as file:
        about = file.metadata()
    name = f"model.layers.0.self_attn.q_proj.{part}"
    found = tensors.pop(name)
    if damage is not None:
        tensors[name] = damage(found).contiguous()
    save_file(tensors, base / "model.safetensors", about)

    with pytest.raises(LlmtuneError, match=message) as raised:
        resolve_base(ModelConfig(base=str(base)))
    assert "\n" not in str(raised.value) and str(base) in str(raised.value)
    assert not [*cache.glob("bases/*")]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
        ({"quant_method": "gptq"}, "bits 'None', expected 2 or 3 or 4 or 8"),
        ({"quant_method": "gptq", "bits": 4.0}, "bits '4.0', expected 2 or 3 or 4 or 8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "weight_block_size"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit"),
        ({"quant_method": "aqlm"}, "'aqlm', which is not read"),
    ],
)
def test_variants_that_are_not_read_are_refused_from_the_config_alone(base, knobs, message):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": knobs}))
    (base / "model.safetensors").unlink()

    with pytest.raises(LlmtuneError, match=message) as raised:
        resolve_base(ModelConfig(base=str(base)))
    assert "give the 16-bit checkpoint" in str(raised.value)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("model.quantization=hqq", "hqq is not offered for training; give {method: nf4 | fp4"),
        ("model.quantization={method: torchao}", "torchao is not offered for training"),
        ("merge.format=gptq", "format: a merged model is written in 16 or 32 bits"),
    ],
)
def test_quantizations_that_are_only_read_are_refused_by_name(
    base, tmp_path, wish, message, capsys
):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"run_dir: run\nmodel: {{base: {base}}}\ndata: {{train: [{{path: a.jsonl}}]}}\n"
    )
    assert run_command(["config", "show", str(config)]) == 0
    capsys.readouterr()
    assert run_command(["config", "show", str(config), wish]) == 2
    assert message in capsys.readouterr().err


def test_pickled_quantized_weights_are_refused_with_what_to_do(base):
    store_quantized(base, "torchao")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(LlmtuneError, match=r"torchao .* pickled .bin files.* save it as safeten"):
        resolve_base(ModelConfig(base=str(base), weights="any"))
