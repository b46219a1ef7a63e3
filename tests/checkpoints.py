"""Checkpoints of two layers with tokenizers of every kind, for exporters and checks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmtune.checks.tricky_strings import TRICKY_STRINGS
from llmtune.exporting.gguf_writer.pretokenizers import (
    LLAMA3_PATTERN,
    QWEN2_PATTERN,
    QWEN35_PATTERN,
)
from tests.tiny import CHATML, CORPUS, SPECIAL_TOKENS, make_model

# {family: what tests/tiny.py does not set}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "head_dim": 32},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "mixtral": {},
    "qwen3_moe": {
        "norm_topk_prob": True,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "gemma": {"head_dim": 16, "num_key_value_heads": 2},
    "gemma2": {},
    "phi": {},
    "phi3": {"num_key_value_heads": 2},
}

BYTE_LEVEL_KINDS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}
for _name, _pattern in {
    "llama-bpe": LLAMA3_PATTERN,
    "dbrx": LLAMA3_PATTERN,
    "qwen2": QWEN2_PATTERN,
    "qwen35": QWEN35_PATTERN,
}.items():
    BYTE_LEVEL_KINDS[_name] = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory):
    """A function that saves a random model of a family, with norms that are not all one."""

    def make(family: str, **overrides) -> Path:
        directory = tmp_path_factory.mktemp(family)
        model = make_model(family, directory, **{**FAMILIES[family], **overrides})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("weight"):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def llama_dir(make_checkpoint) -> Path:
    return make_checkpoint("llama")


def save_byte_level(directory: Path, kind: str) -> None:
    """Train a byte-level tokenizer that cuts text as `kind` does, and save it."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    tokenizer.pre_tokenizer = BYTE_LEVEL_KINDS[kind]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*CORPUS, *TRICKY_STRINGS], trainer)
    _save(tokenizer, directory)


def save_sentencepiece(directory: Path, *, adds_space: bool) -> None:
    """Save a BPE tokenizer with byte fallback, as transformers makes of a sentencepiece model."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    space = normalizers.Replace(" ", "▁")
    parts = [normalizers.Prepend("▁"), space] if adds_space else [space]
    tokenizer.normalizer = normalizers.Sequence(parts)
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<unk>", *SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"] = _all_merges(content["model"])
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token["content"].startswith("<0x")
    ]
    _save(Tokenizer.from_str(json.dumps(content)), directory)


def _all_merges(model: dict) -> list[list[str]]:
    """Return every way to split a token into two tokens, in the order the tokens were made."""
    made: dict[str, None] = dict.fromkeys(left + right for left, right in model["merges"])
    vocabulary = model["vocab"]
    return [
        [token[:cut], token[cut:]]
        for token in made
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]


def _save(tokenizer: Tokenizer, directory: Path) -> None:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )
    fast.chat_template = CHATML
    fast.save_pretrained(directory)
