"""`export` and `verify` from end to end on tiny models: what is made, checked and refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmtune.checks.limits import Tolerances
from llmtune.checks.merged import load_merged
from llmtune.checks.runtime import is_runtime_installed
from llmtune.errors import CheckFailed, LlmtuneError
from llmtune.exporting.gguf_writer.write import GgufRequest, write_gguf
from llmtune.merging.merge import merge_adapter
from llmtune.runs.verify import verify_target
from tests.exporting.exports import export_model

needs_runtime = pytest.mark.skipif(not is_runtime_installed(), reason="needs llmtune[runtime]")


@pytest.fixture(scope="module")
def tuned(llama_dir, tmp_path_factory):
    """An adapter of the tiny base, and the model merged from it."""
    directory = tmp_path_factory.mktemp("tuned")
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    model.name_or_path = str(llama_dir)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(llama_dir)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    adapted.save_pretrained(directory / "adapter")
    merge_adapter(llama_dir, directory / "adapter", directory / "merged")
    return directory


@needs_runtime
def test_gguf_is_checked_in_llama_cpp_before_it_appears(tuned, tmp_path):
    result = export_model(tuned / "merged", "gguf", tmp_path / "m.gguf", "f16", runtime=True)
    assert result["parity"]["num_same_prompts"] == 20
    assert result["parity"]["kl"] < 1e-3
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    json.dumps(result)


@needs_runtime
def test_a_file_that_answers_otherwise_is_not_kept(tuned, tmp_path):
    with pytest.raises(CheckFailed, match="the file was removed"):
        export_model(
            tuned / "merged", "gguf", tmp_path / "m.gguf", "q4_0", runtime=True, max_kl=0.0
        )
    assert list(tmp_path.iterdir()) == []


def test_an_ollama_directory_holds_model_template_and_card(tuned, tmp_path):
    out = tmp_path / "ollama"
    result = export_model(tuned / "merged", "ollama", out, "f16", runtime=False)
    assert sorted(path.name for path in out.iterdir()) == [
        "Modelfile",
        "README.md",
        "llmtune_export.json",
        "merged-f16.gguf",
    ]
    assert (out / "Modelfile").read_text().startswith("FROM ./merged-f16.gguf\n")
    assert result["path"] == str(out / "merged-f16.gguf")
    with pytest.raises(LlmtuneError, match="exists already"):
        export_model(tuned / "merged", "ollama", out, "f16", runtime=False)


def test_an_adapter_must_be_merged_before_its_model_is_exported(tuned, tmp_path):
    with pytest.raises(LlmtuneError, match="llmtune merge"):
        export_model(tuned / "adapter", "gguf", tmp_path / "m.gguf")


def test_an_adapter_is_exported_alone(tuned, tmp_path):
    result = export_model(tuned / "adapter", "adapter-gguf", tmp_path / "a.gguf")
    assert result["num_tensors"] == 2 * 2 * 2
    assert result["type"] == "f16"


def test_a_directory_needs_a_place_for_its_export(tuned):
    with pytest.raises(LlmtuneError, match="--out"):
        export_model(tuned / "merged", "gguf", None)


def test_nf4_loads_as_it_was_saved(tuned, tmp_path):
    result = export_model(tuned / "merged", "nf4", tmp_path / "nf4")
    assert result["reloaded"]["kl"] <= 1e-3
    assert result["quantized_ratio"] > 0.3
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert (tmp_path / "nf4" / "tokenizer.json").read_bytes() == (
        tuned / "merged" / "tokenizer.json"
    ).read_bytes()


def test_a_reloaded_checkpoint_computes_with_the_kernels_it_was_saved_with(
    tuned, tmp_path, monkeypatch
):
    # On a CPU with AVX-512 a kernel with roundings of its own would compute one side only.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    export_model(tuned / "merged", "nf4", tmp_path / "nf4")
    reloaded = load_merged(tmp_path / "nf4", dtype=torch.float32, device="cpu")
    layers = [one for one in reloaded.modules() if hasattr(one, "support_avx512bf16_for_cpu")]
    assert layers
    assert not any(one.support_avx512bf16_for_cpu for one in layers)


def verify(subject, against, **settings):
    verified = verify_target(subject, str(against), [], Tolerances(**settings))
    verified.require_passed()
    return verified.to_dict()


def test_the_merged_model_is_the_adapter_model(tuned):
    result = verify(tuned / "merged", tuned / "adapter")
    assert result["problems"] == []
    assert result["kl"] < 1e-5
    assert result["num_same_strings"] == 200


def test_the_base_is_not_the_adapter_model(tuned, llama_dir):
    with pytest.raises(CheckFailed, match="KL .* allowed are"):
        verify(llama_dir, tuned / "adapter")


def test_a_corrupted_tensor_is_seen(tuned, tmp_path):
    shutil.copytree(tuned / "merged", tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= -1
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match="KL"):
        verify(tmp_path / "broken", tuned / "adapter")


def test_another_template_and_lost_stop_tokens_are_seen(tuned, tmp_path):
    shutil.copytree(tuned / "merged", tmp_path / "other")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "other" / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckFailed, match="20 of 20 chat prompts become other token ids"):
        verify(tmp_path / "other", tuned / "adapter")


@needs_runtime
def test_a_gguf_file_is_verified_against_the_adapter(tuned, llama_dir, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(GgufRequest(tuned / "merged", path, "q8_0", "tiny"))
    result = verify(path, tuned / "adapter")
    assert result["type"] == "q8_0"
    assert result["file"] is None  # an adapter directory has no merged model beside it
    assert result["chain"]["max_kl"] == pytest.approx(0.1)
    assert result["chain"]["kl"] < 0.01
    write_gguf(GgufRequest(llama_dir, tmp_path / "base.gguf", "q8_0", "tiny"))
    with pytest.raises(CheckFailed, match=r"KL to the live adapter .* allowed are 0\.1"):
        verify(tmp_path / "base.gguf", tuned / "adapter")


@needs_runtime
def test_a_file_is_verified_against_the_model_alone_where_there_is_no_adapter(tuned, tmp_path):
    export_model(tuned / "merged", "gguf", tmp_path / "m.gguf", "f16", runtime=False)
    result = verify(tmp_path / "m.gguf", tuned / "merged")
    assert result["chain"] is None
    assert (result["file"]["against"], result["file"]["max_kl"]) == ("model", 0.01)
    with pytest.raises(CheckFailed, match="KL to the model .* allowed are 1e-12"):
        verify(tmp_path / "m.gguf", tuned / "merged", max_kl=1e-12)


@needs_runtime
def test_a_file_of_other_weights_than_those_that_lie_there_now_is_seen(tuned, tmp_path):
    shutil.copytree(tuned / "merged", tmp_path / "model")
    export_model(tmp_path / "model", "gguf", tmp_path / "m.gguf", "f16", runtime=False)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0] += 0.001
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match="made from other weights than those in .*model"):
        verify(tmp_path / "m.gguf", tmp_path / "model")


def test_a_weaker_merge_is_compared_with_the_adapter_at_that_strength(tuned, llama_dir, tmp_path):
    merge_adapter(llama_dir, tuned / "adapter", tmp_path / "half", strength=0.5)
    result = verify(tmp_path / "half", tuned / "adapter")
    assert result["strength"] == 0.5
    assert result["kl"] < 1e-5
    record = tmp_path / "half" / "llmtune_merge.json"
    record.write_text(record.read_text().replace('"strength": 0.5', '"strength": 1.0'))
    with pytest.raises(CheckFailed, match="KL"):
        verify(tmp_path / "half", tuned / "adapter")


def test_a_merge_of_another_adapter_is_named_as_that(tuned, llama_dir, tmp_path):
    shutil.copytree(tuned / "adapter", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "adapter_model.safetensors")
    save_file(
        {name: 0.999 * one for name, one in tensors.items()},
        tmp_path / "other" / "adapter_model.safetensors",
    )
    merge_adapter(llama_dir, tmp_path / "other", tmp_path / "merged")
    with pytest.raises(CheckFailed, match="merged from another adapter"):
        verify(tmp_path / "merged", tuned / "adapter")


@pytest.mark.parametrize("to", ["nf4", "ollama", "gguf"])
def test_what_is_no_export_is_never_replaced(to, tuned, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("kept")
    with pytest.raises(LlmtuneError, match="so it is not replaced"):
        export_model(tuned / "merged", to, mine, force=True, runtime=False)
    (tmp_path / "notes.txt").write_text("kept")
    with pytest.raises(LlmtuneError, match="so it is not replaced"):
        export_model(tuned / "merged", to, tmp_path / "notes.txt", force=True, runtime=False)
    assert (mine / "thesis.txt").read_text() == (tmp_path / "notes.txt").read_text() == "kept"


def test_an_earlier_export_is_replaced_when_asked(tuned, tmp_path):
    for to, name in (("gguf", "m.gguf"), ("ollama", "ollama")):
        for type in ("f16", "q8_0"):
            export_model(tuned / "merged", to, tmp_path / name, type, force=True, runtime=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "ollama"]
    assert (tmp_path / "ollama" / "merged-q8_0.gguf").is_file()
    assert not (tmp_path / "ollama" / "merged-f16.gguf").exists()


@pytest.mark.parametrize("name", ["nothing", "nothing.gguf"])
def test_a_subject_that_is_not_there_is_an_error(name, tuned, tmp_path):
    with pytest.raises(LlmtuneError, match="does not exist"):
        verify(tmp_path / name, tuned / "adapter")


@needs_runtime
def test_an_adapter_file_is_no_model(tuned, tmp_path):
    export_model(tuned / "adapter", "adapter-gguf", tmp_path / "a.gguf")
    with pytest.raises(LlmtuneError, match="holds an adapter"):
        verify(tmp_path / "a.gguf", tuned / "adapter")
