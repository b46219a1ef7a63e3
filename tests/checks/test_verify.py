"""A model directory or a file is what it was made from, or `verify` says in what it differs."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from llmtune.checks.runtime import is_runtime_installed
from llmtune.checks.verification import Tolerances
from llmtune.errors import CheckFailed, LlmtuneError
from llmtune.exporting.gguf_writer.write import GgufRequest, write_gguf
from llmtune.merging.merge import merge_adapter
from llmtune.models.checkpoint import Checkpoint
from llmtune.runs.verify import verify_target
from tests.exporting.exports import export_model, make_tuned

needs_runtime = pytest.mark.skipif(not is_runtime_installed(), reason="needs llmtune[runtime]")


@pytest.fixture(scope="module")
def tuned(llama_dir, tmp_path_factory):
    """An adapter of the tiny base, and the model merged from it."""
    return make_tuned(llama_dir, tmp_path_factory.mktemp("tuned"))


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
    with pytest.raises(CheckFailed, match="KL .* the limit is"):
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
    with pytest.raises(CheckFailed, match="20 of 20 chat prompts are tokenized differently"):
        verify(tmp_path / "other", tuned / "adapter")


@needs_runtime
def test_a_gguf_file_is_verified_against_the_adapter(tuned, llama_dir, tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(GgufRequest(Checkpoint.open(tuned / "merged"), path, "q8_0", "tiny"))
    result = verify(path, tuned / "adapter")
    assert result["type"] == "q8_0"
    assert result["file"] is None  # an adapter directory has no merged model beside it
    assert result["chain"]["max_kl"] == pytest.approx(0.1)
    assert result["chain"]["kl"] < 0.01
    write_gguf(GgufRequest(Checkpoint.open(llama_dir), tmp_path / "base.gguf", "q8_0", "tiny"))
    with pytest.raises(CheckFailed, match=r"KL to the live adapter .* the limit is 0\.1"):
        verify(tmp_path / "base.gguf", tuned / "adapter")


@needs_runtime
def test_a_file_is_verified_against_the_model_alone_where_there_is_no_adapter(tuned, tmp_path):
    export_model(tuned / "merged", "gguf", tmp_path / "m.gguf", "f16", runtime=False)
    result = verify(tmp_path / "m.gguf", tuned / "merged")
    assert result["chain"] is None
    assert (result["file"]["against"], result["file"]["max_kl"]) == ("model", 0.01)
    with pytest.raises(CheckFailed, match="KL to the model .* the limit is 1e-12"):
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
    with pytest.raises(CheckFailed, match="made from a different adapter"):
        verify(tmp_path / "merged", tuned / "adapter")


@pytest.mark.parametrize("name", ["nothing", "nothing.gguf"])
def test_a_subject_that_is_not_there_is_an_error(name, tuned, tmp_path):
    with pytest.raises(LlmtuneError, match="does not exist"):
        verify(tmp_path / name, tuned / "adapter")


@needs_runtime
def test_an_adapter_file_is_no_model(tuned, tmp_path):
    export_model(tuned / "adapter", "adapter-gguf", tmp_path / "a.gguf")
    with pytest.raises(LlmtuneError, match="holds an adapter"):
        verify(tmp_path / "a.gguf", tuned / "adapter")
