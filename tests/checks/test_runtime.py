"""llama.cpp itself reads the file as transformers reads the checkpoint."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtune.checks import runtime
from llmtune.checks.runtime import RuntimeRequest, ask_runtime, is_runtime_installed
from llmtune.checks.tricky_strings import TRICKY_STRINGS
from llmtune.data.render import render_messages
from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.write import GgufRequest, write_gguf
from llmtune.models.checkpoint import Checkpoint
from tests.checkpoints import (
    BYTE_LEVEL_KINDS,
    FAMILIES,
    save_byte_level,
    save_sentencepiece,
)

needs_runtime = pytest.mark.skipif(not is_runtime_installed(), reason="needs llmtune[runtime]")

PROMPTS = [[2, 40, 50, 60, 70, 80], [2] + [(7 * place) % 480 + 10 for place in range(100)]]
CLOSE = 0.02
"""Nats by which log-probabilities may differ: llama.cpp keeps keys and values in float16."""

ROPES = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def export(source: Path) -> Path:
    path = source / "model.gguf"
    write_gguf(GgufRequest(Checkpoint.open(source), path, "f32", "tiny"))
    return path


def check_distributions(source: Path) -> None:
    answers = ask_runtime(export(source), RuntimeRequest(prompts=PROMPTS))
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    for prompt, found in zip(PROMPTS, answers.distributions, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert len(found) == len(expected)
        for id, value in enumerate(expected.tolist()):
            assert found[id] == pytest.approx(value, abs=CLOSE), (id, prompt[:3])


@needs_runtime
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_transformers_computes(family, make_checkpoint):
    check_distributions(make_checkpoint(family))


@needs_runtime
@pytest.mark.parametrize("kind", ROPES)
def test_scaled_positions_are_the_same(kind, make_checkpoint):
    check_distributions(make_checkpoint("llama", rope_parameters=ROPES[kind]))


@needs_runtime
def test_biases_are_paired_like_their_weights(make_checkpoint):
    check_distributions(make_checkpoint("llama", attention_bias=True, mlp_bias=True))


def check_tokens(source: Path) -> None:
    tokenizer = Checkpoint.open(source).tokenizer
    found = ask_runtime(export(source), RuntimeRequest(texts=TRICKY_STRINGS)).text_ids
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TRICKY_STRINGS]
    odd = [
        (text, list(one), other)
        for text, one, other in zip(TRICKY_STRINGS, found, expected, strict=True)
        if list(one) != other
    ]
    assert not odd, f"{len(odd)}: {odd[:3]}"


@needs_runtime
@pytest.mark.parametrize("kind", BYTE_LEVEL_KINDS)
def test_tricky_strings_get_the_same_tokens_byte_level(kind, make_checkpoint):
    source = make_checkpoint("llama")
    save_byte_level(source, kind)
    check_tokens(source)


@needs_runtime
@pytest.mark.parametrize("adds_space", [False, True])
def test_tricky_strings_get_the_same_tokens_sentencepiece(adds_space, make_checkpoint):
    source = make_checkpoint("gemma")
    save_sentencepiece(source, adds_space=adds_space)
    check_tokens(source)


@needs_runtime
def test_a_conversation_becomes_the_same_prompt(llama_dir):
    messages = [{"role": "user", "content": "Is it good?  Yes."}]
    tokenizer = Checkpoint.open(llama_dir).tokenizer
    answer = ask_runtime(export(llama_dir), RuntimeRequest(conversations=[messages])).answers[0]
    expected = render_messages(tokenizer, messages, add_generation_prompt=True)
    assert list(answer.prompt_ids) == expected
    assert len(answer.token_ids) == len(answer.margins)


@needs_runtime
def test_a_file_that_llama_cpp_cannot_load_is_an_error(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(LlmtuneError, match=r"bad\.gguf: llama\.cpp failed"):
        ask_runtime(tmp_path / "bad.gguf", RuntimeRequest(prompts=PROMPTS))


def test_a_missing_runtime_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "PACKAGE", "no_such_package")
    with pytest.raises(LlmtuneError, match=r"pip install xllamacpp"):
        ask_runtime(tmp_path / "any.gguf", RuntimeRequest())


def test_there_are_two_hundred_different_strings():
    assert len(set(TRICKY_STRINGS)) == 200
