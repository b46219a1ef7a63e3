"""What cannot be exported is refused from the small files alone, before any training."""

import json
import subprocess
import sys

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmtune.errors import LlmtuneError
from llmtune.exporting.config import check_exportable
from llmtune.exporting.gguf_writer.architectures import (
    find_architecture,
    hyperparameters,
    read_full_config,
)
from llmtune.exporting.gguf_writer.tensors import plan_tensors
from llmtune.exporting.gguf_writer.types import OWN_TYPES
from llmtune.models.checkpoint import Checkpoint
from tests.checkpoints import FAMILIES, save_byte_level, save_sentencepiece
from tests.versions import without_torch


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_pass_without_their_weights(family, make_checkpoint):
    directory = make_checkpoint(family)
    (directory / "model.safetensors").unlink()
    for type in OWN_TYPES:
        check_exportable(Checkpoint.open(directory), "gguf", type)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_an_unsupported_architecture_is_refused(family, tmp_path):
    from tests.tiny import make_model

    make_model(family, tmp_path)
    with pytest.raises(LlmtuneError, match=f"does not support model type '{family}'"):
        check_exportable(Checkpoint.open(tmp_path), "gguf")
    check_exportable(Checkpoint.open(tmp_path), "nf4")


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("llama", "hidden_act", "relu", "activation 'relu'"),
        ("llama", "rope_parameters", {"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ("qwen2", "use_sliding_window", True, "use_sliding_window"),
        ("qwen3_moe", "norm_topk_prob", False, "norm_topk_prob"),
        ("gemma2", "query_pre_attn_scalar", 144, "query_pre_attn_scalar 144, expected 16"),
        ("phi", "qk_layernorm", True, "qk_layernorm"),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(
    family, key, value, message, make_checkpoint
):
    directory = make_checkpoint(family)
    change_json(directory / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(LlmtuneError, match=message):
        check_exportable(Checkpoint.open(directory), "gguf")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_config_json_leaves_out_is_what_its_class_says(family, make_checkpoint):
    overrides = {"gemma": {"head_dim": 256}, "qwen3": {"head_dim": 128}}
    directory = make_checkpoint(family, **overrides.get(family, {}))
    written = json.loads((directory / "config.json").read_text())
    source = Checkpoint.open(directory)
    expected = hyperparameters(find_architecture(source), read_full_config(source))
    assert expected == hyperparameters(find_architecture(source), written)
    usual = CONFIG_MAPPING[family]().to_dict()
    left_out = {key for key, value in written.items() if key in usual and value == usual[key]}
    left_out -= {"model_type"}
    assert left_out
    change_json(
        directory / "config.json", lambda config: [config.pop(key) for key in sorted(left_out)]
    )
    source = Checkpoint.open(directory)
    config = read_full_config(source)
    assert hyperparameters(find_architecture(source), config) == expected
    rows = len(plan_tensors(source, find_architecture(source), written, "f32"))
    assert len(plan_tensors(source, find_architecture(source), config, "f32")) == rows


def test_a_config_that_transformers_refuses_is_named(make_checkpoint):
    directory = make_checkpoint("llama")
    change_json(directory / "config.json", lambda config: config.update(rms_norm_eps=["x"]))
    with pytest.raises(LlmtuneError, match=r"config\.json: transformers cannot make a llama"):
        check_exportable(Checkpoint.open(directory), "gguf")


def test_an_unknown_pre_tokenizer_is_refused(make_checkpoint):
    directory = make_checkpoint("llama")
    pattern = {"type": "Split", "pattern": {"Regex": r"\w+|\s"}, "behavior": "Isolated"}
    change_json(directory / "tokenizer.json", lambda file: file.update(pre_tokenizer=pattern))
    with pytest.raises(LlmtuneError, match=r"no pre-tokenizer.*\\w\+"):
        check_exportable(Checkpoint.open(directory), "gguf")


def test_a_space_before_every_text_is_refused_for_byte_level(make_checkpoint):
    directory = make_checkpoint("llama")
    change_json(
        directory / "tokenizer.json",
        lambda file: file["pre_tokenizer"].update(add_prefix_space=True),
    )
    with pytest.raises(LlmtuneError, match="add_prefix_space"):
        check_exportable(Checkpoint.open(directory), "gguf")


def test_a_sentencepiece_token_with_an_unlisted_merge_is_refused(make_checkpoint):
    directory = make_checkpoint("llama")
    save_sentencepiece(directory, adds_space=False)
    check_exportable(Checkpoint.open(directory), "gguf")
    change_json(
        directory / "tokenizer.json",
        lambda file: file["model"]["merges"].pop(-1),
    )
    with pytest.raises(LlmtuneError, match="can be joined from other pieces"):
        check_exportable(Checkpoint.open(directory), "gguf")


def test_more_stop_tokens_than_the_file_can_name_are_refused(make_checkpoint):
    directory = make_checkpoint("llama")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1, 2, 3]}))
    with pytest.raises(LlmtuneError, match="4 tokens end an answer"):
        check_exportable(Checkpoint.open(directory), "gguf")


@pytest.mark.parametrize(
    ("to", "type", "message"),
    [
        ("onnx", None, "expected one of gguf"),
        ("gguf", "q4_9", "writes f32, f16"),
        ("nf4", "f16", "has no types"),
        ("adapter-gguf", "q8_0", "writes f32, f16, bf16"),
    ],
)
def test_unknown_kinds_and_types_are_refused(to, type, message, llama_dir):
    with pytest.raises(LlmtuneError, match=message):
        check_exportable(Checkpoint.open(llama_dir), to, type)


def test_llama3_and_smollm_are_told_apart(make_checkpoint):
    from llmtune.exporting.gguf_writer.vocabulary import read_vocabulary

    directory = make_checkpoint("llama")
    for kind in ("smollm", "llama-bpe", "dbrx", "qwen2"):
        save_byte_level(directory, kind)
        assert read_vocabulary(Checkpoint.open(directory)).pre.name == kind


@without_torch
def test_the_check_loads_neither_peft_nor_gguf(llama_dir):
    code = (
        "import sys; from pathlib import Path;"
        "from llmtune.exporting.config import check_exportable;"
        "from llmtune.models.checkpoint import Checkpoint;"
        f"check_exportable(Checkpoint.open(Path({str(llama_dir)!r})), 'gguf', 'q8_0');"
        "assert not {'gguf', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
