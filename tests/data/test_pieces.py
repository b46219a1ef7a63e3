"""A long text is tokenized in pieces, and its tokens are those of the whole."""

import logging
import tracemalloc

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmtune.data import duplicates, overlap, pieces, render, suspicion
from llmtune.data.conversation import Conversation
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


def test_a_long_text_is_compared_and_counted_in_pieces_as_it_is_whole(monkeypatch):
    text = f"{TEXT} x² \u00a0ﬁne  Σίσυφος a\u0301 \u0301b  中文{'。' * 3000} end {TEXT.upper()}"
    document = Conversation(kind="text", text=text)
    whole = overlap.conversation_key(document), suspicion.main_script(text)
    shingles = duplicates._shingle(text)
    monkeypatch.setattr(overlap, "PIECE_CHARACTERS", 700)
    monkeypatch.setattr(suspicion, "COUNTED_CHARACTERS", 700)
    monkeypatch.setattr(duplicates, "HASHED_WINDOWS", 700)
    assert len(list(overlap._pieces(text))) > 20
    assert (overlap.conversation_key(document), suspicion.main_script(text)) == whole
    assert (duplicates._shingle(text) == shingles).all()


@pytest.mark.parametrize(
    ("look", "bytes_a_character"),
    [
        (lambda text: overlap.conversation_key(Conversation(kind="text", text=text)), 5),
        (suspicion.main_script, 5),
        (duplicates._shingle, 19),
        (duplicates._window_hashes, 7),
    ],
)
def test_looking_at_a_long_text_takes_a_few_times_its_size(look, bytes_a_character):
    words = "the plot is dull and nobody laughs at Paris in the end 12 times "
    text = "é " + words * (2_000_000 // len(words))
    tracemalloc.start()
    try:
        look(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak / len(text) < bytes_a_character
