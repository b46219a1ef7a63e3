"""`export` from end to end on tiny models: what is made, checked and refused."""

import json

import pytest
import torch

from llmtune.checks.merged import load_merged
from llmtune.checks.runtime import is_runtime_installed
from llmtune.errors import CheckFailed, LlmtuneError
from tests.exporting.exports import export_model, make_tuned

needs_runtime = pytest.mark.skipif(not is_runtime_installed(), reason="needs llmtune[runtime]")


@pytest.fixture(scope="module")
def tuned(llama_dir, tmp_path_factory):
    """An adapter of the tiny base, and the model merged from it."""
    return make_tuned(llama_dir, tmp_path_factory.mktemp("tuned"))


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
    for out in (tmp_path / "m.gguf", None):
        with pytest.raises(
            LlmtuneError, match="llmtune merge .* --out merged, then: llmtune export"
        ):
            export_model(tuned / "adapter", "gguf", out)


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
