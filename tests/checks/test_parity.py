"""The comparison of a file with its model sees what is equal and what is not."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune.checks.parity import ParityRequest, compare_with_runtime
from llmtune.checks.runtime import is_runtime_installed
from llmtune.exporting.gguf_writer.write import GgufRequest, write_gguf
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.config import TemplateChoice

pytestmark = pytest.mark.skipif(not is_runtime_installed(), reason="needs llmtune[runtime]")


def compare(source, path, **keywords):
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    request = ParityRequest(path, (3,), max_new_tokens=8, num_threads=1, **keywords)
    return compare_with_runtime(model, Checkpoint.open(source).tokenizer, request)


def test_an_exact_file_answers_as_the_model(llama_dir, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(GgufRequest(Checkpoint.open(llama_dir), path, "f32", "tiny"))
    result = compare(llama_dir, path)
    assert (result.num_prompts, result.num_same_prompts, result.num_same_strings) == (20, 20, 200)
    assert 0 <= result.kl < 1e-4
    assert result.num_same_answers >= 18
    assert result.num_same_stops == 20


def test_another_models_file_is_seen(llama_dir, make_checkpoint, tmp_path):
    source = tmp_path / "other"
    shutil.copytree(llama_dir, source)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors["model.layers.1.mlp.up_proj.weight"] *= -1
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    write_gguf(GgufRequest(Checkpoint.open(source), tmp_path / "model.gguf", "f32", "tiny"))
    result = compare(llama_dir, tmp_path / "model.gguf")
    assert result.kl > 0.05
    assert result.differences
    first = result.differences[0]
    assert first.margin >= 0
    assert first.token != first.file_token


def test_another_template_is_seen(llama_dir, tmp_path):
    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    path = tmp_path / "model.gguf"
    write_gguf(
        GgufRequest(
            Checkpoint.open(llama_dir, template=TemplateChoice(template)), path, "f32", "tiny"
        )
    )
    assert compare(llama_dir, path).num_same_prompts == 0
