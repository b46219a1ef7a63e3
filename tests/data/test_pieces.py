"""A long text is tokenized in pieces, and its tokens are those of the whole."""

import logging

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmtune.data import pieces, render
from llmtune.data.render import encode_plain
from tests.tiny import CORPUS, make_tokenizer

TEXT = "".join(
    f"{line}\n\n  Ünïcode é 你好 {number} word's  end...\n\t- one, two\r\nlast line {line} "
    for number in range(60)
    for line in CORPUS
)


@pytest.fixture
def small_pieces(monkeypatch):
    """Cut texts that a test can afford."""
    for module in (pieces, render):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 1500)


def train(pre_tokenizer=None, normalizer=None):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, TEXT[:4000]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def whole(tokenizer, text):
    """Return what the tokenizer makes of the text, with what it puts before it."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


@pytest.mark.parametrize(
    ("make", "is_cut"),
    [
        (make_tokenizer, True),
        (lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=False)), True),
        (lambda: train(pre_tokenizers.Whitespace(), normalizers.NFKC()), True),
        (lambda: train(pre_tokenizers.Metaspace(prepend_scheme="first")), True),
        (lambda: train(None, normalizers.Replace(" ", "\u2581")), False),
    ],
)
def test_pieces_have_the_tokens_of_the_whole(small_pieces, caplog, make, is_cut):
    tokenizer = make()
    with caplog.at_level(logging.WARNING, "llmtune"):
        ids = encode_plain(tokenizer, TEXT)
    assert ids == whole(tokenizer, TEXT)
    assert ("is tokenized whole" in caplog.text) != is_cut
