"""What is asked of a scored model, as token ids; light, so that lengths are checked without it."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from llmtune.data.render import leading_special_ids


@dataclass(frozen=True)
class ContinuationRequest:
    """One prompt and the continuations to score after it, all as token ids, none empty."""

    prompt_ids: tuple[int, ...]
    choice_ids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ContinuationScore:
    """log p(continuation | prompt) in nats, and whether greedy decoding would have written it."""

    log_likelihood: float
    num_tokens: int
    is_greedy: bool


@dataclass(frozen=True)
class Passage:
    """A text as token ids, the first only context; `num_bytes` counts the predicted tokens."""

    token_ids: tuple[int, ...]
    has_bos: bool
    num_bytes: int


def encode_passage(tokenizer: PreTrainedTokenizerFast, text: str) -> Passage:
    """Return a text's token ids after the BOS that the tokenizer itself would put there, if any."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = tuple(encoded["input_ids"])
    bos = leading_special_ids(tokenizer)
    if bos or not ids:
        return Passage((*bos, *ids), bool(bos), len(text.encode()))
    first_end = encoded["offset_mapping"][0][1]
    return Passage(ids, False, len(text[first_end:].encode()))


def cut_windows(passage: Passage, max_length: int) -> list[tuple[int, ...]]:
    """Cut a passage into windows whose first token is context and whose others are predicted."""
    ids, step = passage.token_ids, max_length - 1
    starts = range(0, len(ids) - 1, step)
    if not passage.has_bos:
        return [ids[start : start + max_length] for start in starts]
    return [(ids[0], *ids[start + 1 : start + max_length]) for start in starts]
