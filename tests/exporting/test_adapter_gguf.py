"""A LoRA GGUF on a GGUF of the base is base + adapter; what it cannot hold is refused."""

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune.checks.runtime import RuntimeRequest, ask_runtime, is_runtime_installed
from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.adapter import write_adapter_gguf
from llmtune.exporting.gguf_writer.write import GgufRequest, write_gguf
from llmtune.models.checkpoint import Checkpoint

PROMPT = [2, 40, 50, 60, 70, 80]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(base, directory, **settings):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **settings}
    adapted = get_peft_model(model, LoraConfig(**config))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(directory)
    return directory


@pytest.mark.skipif(not is_runtime_installed(), reason="needs llmtune[runtime]")
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 32}}],
    ids=["lora", "rslora", "patterns"],
)
def test_llama_cpp_applies_the_adapter_as_peft_does(settings, llama_dir, tmp_path):
    adapter = save_adapter(llama_dir, tmp_path / "adapter", **settings)
    base, lora = tmp_path / "base.gguf", tmp_path / "adapter.gguf"
    write_gguf(GgufRequest(Checkpoint.open(llama_dir), base, "f32", "tiny"))
    write_adapter_gguf(adapter, Checkpoint.open(llama_dir), lora, type="f32", provenance={})
    found = ask_runtime(base, RuntimeRequest(prompts=[PROMPT], lora=str(lora))).distributions[0]
    plain = AutoModelForCausalLM.from_pretrained(llama_dir)
    with torch.no_grad():
        before = plain(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
        adapted = PeftModel.from_pretrained(plain, adapter).eval()
        expected = adapted(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    assert (before - expected).abs().max() > 0.5
    for id, value in enumerate(expected.tolist()):
        assert found[id] == pytest.approx(value, abs=0.03)


def test_the_file_says_that_it_is_an_adapter(llama_dir, tmp_path):
    adapter = save_adapter(llama_dir, tmp_path / "adapter")
    write_adapter_gguf(
        adapter,
        Checkpoint.open(llama_dir),
        tmp_path / "a.gguf",
        type="f16",
        provenance={"llmtune.adapter": "x"},
    )
    reader = GGUFReader(tmp_path / "a.gguf")
    assert reader.get_field("general.type").contents() == "adapter"
    assert reader.get_field("adapter.lora.alpha").contents() == 8
    assert reader.get_field("llmtune.adapter").contents() == "x"
    assert len(reader.tensors) == 2 * 2 * len(LINEARS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA magnitudes"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "an embedding"),
        ({"trainable_token_indices": [5]}, "trained token rows"),
    ],
)
def test_what_llama_cpp_adapters_cannot_hold_is_refused(settings, message, llama_dir, tmp_path):
    adapter = save_adapter(llama_dir, tmp_path / "adapter", **settings)
    with pytest.raises(LlmtuneError, match=message):
        write_adapter_gguf(
            adapter, Checkpoint.open(llama_dir), tmp_path / "a.gguf", type="f16", provenance={}
        )
    assert not (tmp_path / "a.gguf").exists()


def cut(directory, **changes):
    """Change the tensors of the first query projection, {A or B: how}."""
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    for part, change in changes.items():
        name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"
        tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A": lambda a: a[:, :-1]}, "the adapter of module .*q_proj.* is for a weight of"),
        ({"B": lambda b: b[:-1]}, "the adapter of module .*q_proj.* is for a weight of"),
        ({"A": lambda a: a[:-1]}, "gives that module rank 4"),
        ({"A": lambda a: a[:-1], "B": lambda b: b[:, :-1]}, "gives that module rank 4"),
    ],
    ids=["width", "height", "pair", "rank"],
)
def test_factors_that_do_not_fit_the_base_are_refused(changes, message, llama_dir, tmp_path):
    adapter = save_adapter(llama_dir, tmp_path / "adapter")
    cut(adapter, **changes)
    with pytest.raises(LlmtuneError, match=message):
        write_adapter_gguf(
            adapter, Checkpoint.open(llama_dir), tmp_path / "a.gguf", type="f16", provenance={}
        )
    assert not (tmp_path / "a.gguf").exists()
