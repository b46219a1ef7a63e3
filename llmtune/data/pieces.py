"""A long text tokenized in pieces whose tokens together are exactly those of the whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("llmtune")

HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What a token that ends inside of a character is decoded to."""
PIECE_CHARACTERS = 1 << 18
"""A longer text is cut; a tokenizer takes some 130 bytes for each character of what it is given."""
SEARCHED_CHARACTERS = 1 << 14
WINDOW = 256
"""Characters on either side of a cut that are tokenized whole and apart to compare."""


def encode_long(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of a text without special tokens; a long one is tokenized in pieces.

    A cut is made between a letter and a space, where the tokenizer's own first step (its
    pre-tokenizer) has a boundary, so that no token and no merge reaches over it; around every cut
    the ids of both sides are compared with those of the whole. If a tokenizer has no such
    boundaries (SentencePiece models that merge over spaces), the text is tokenized whole, and that
    is logged.
    """
    if len(text) <= PIECE_CHARACTERS:
        return _encode(tokenizer, text)
    known = list(range(max(tokenizer.get_vocab().values()) + 1))  # one object for every id
    ids: list[int] = []
    for piece in _cut(tokenizer, text):
        ids += [known[token] for token in _encode(tokenizer, piece)]
    return ids


def _cut(tokenizer: PreTrainedTokenizerFast, text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = _find_cut(tokenizer, text, start + PIECE_CHARACTERS)
        if end is None:
            log.warning(
                "a text of %d characters is tokenized whole, which takes much memory: this "
                "tokenizer has no boundary at which it can be cut exactly; split long documents "
                "into rows",
                len(text) - start,
            )
            break
        yield text[start:end]
        start = end
    yield text[start:]


def _find_cut(tokenizer: PreTrainedTokenizerFast, text: str, place: int) -> int | None:
    """Return the first exact cut from `place` on, or None."""
    tried = 0
    for cut in range(place, min(place + SEARCHED_CHARACTERS, len(text) - 1)):
        if text[cut - 1].isalpha() and text[cut] in " \n":
            if _is_exact(tokenizer, text, cut):
                return cut
            tried += 1
            if tried == 8:
                return None
    return None


def _is_exact(tokenizer: PreTrainedTokenizerFast, text: str, cut: int) -> bool:
    before, after = text[cut - WINDOW : cut], text[cut : cut + WINDOW]
    first_step = tokenizer.backend_tokenizer.pre_tokenizer
    if first_step is None:
        return False
    normalizer = tokenizer.backend_tokenizer.normalizer
    if normalizer is not None:
        whole = normalizer.normalize_str(before + after)
        if whole != normalizer.normalize_str(before) + normalizer.normalize_str(after):
            return False
        before, after = (normalizer.normalize_str(part) for part in (before, after))
    parts = [[part for part, _ in first_step.pre_tokenize_str(one)] for one in (before, after)]
    together = [part for part, _ in first_step.pre_tokenize_str(before + after)]
    if together != parts[0] + parts[1]:
        return False
    sides = (text[cut - WINDOW : cut], text[cut : cut + WINDOW])
    apart = [token for side in sides for token in _encode(tokenizer, side)]
    return apart == _encode(tokenizer, "".join(sides))


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
    )["input_ids"]
    return ids
