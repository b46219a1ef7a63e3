"""A tokenizer in the words of a GGUF file: tokens, kinds, merges or scores, special ids."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from llmtune.errors import LlmtuneError
from llmtune.exporting.gguf_writer.architectures import find_architecture
from llmtune.exporting.gguf_writer.pretokenizers import PreTokenizer, recognize_pre_tokenizer
from llmtune.io.json_files import read_json_object
from llmtune.models.checkpoint import Checkpoint
from llmtune.models.tokenizer import TOKENIZER_NAME

PROBE = "a"
NUM_STOPS = 3
"""A GGUF file names an end of text, of turn and of message."""
LOWEST_SCORE = -1e9
PHI3_NEVER_TRIMS = frozenset({"<unk>", "<s>", "<|endoftext|>"})


class TokenKind(IntEnum):
    """`tokenizer.ggml.token_type`, as in gguf.TokenType."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Everything llama.cpp needs to know of a tokenizer; one token for each embedding row."""

    pre: PreTokenizer
    tokens: tuple[str, ...]
    kinds: tuple[TokenKind, ...]
    merges: tuple[str, ...]  # "left right", best first; byte-level BPE only
    scores: tuple[float, ...]  # higher merges first; sentencepiece only
    special_ids: Mapping[str, int]  # bos, eos, eot, eom, unk, pad
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None
    trims_as_phi3: bool
    """Special tokens take the spaces after them, as llama.cpp does for a model named Phi-3."""
    notices: tuple[str, ...]


def check_convertible(base: Checkpoint) -> None:
    """Check that llama.cpp computes a checkpoint as transformers does, and has its tokenizer.

    Raises:
        LlmtuneError: its architecture, a number in its config, or its tokenizer is not supported.
    """
    find_architecture(base)
    read_vocabulary(base)


def read_tokenizer_json(directory: Path) -> dict[str, Any]:
    """Parse a checkpoint's tokenizer.json.

    Raises:
        LlmtuneError: there is none, or it is not a tokenizer's JSON.
    """
    path = directory / TOKENIZER_NAME
    if not path.is_file():
        raise LlmtuneError(f"{directory}: no tokenizer: expected {TOKENIZER_NAME}.")
    return read_json_object(path)


def read_vocabulary(base: Checkpoint) -> Vocabulary:
    """Read a checkpoint's tokenizer, chat template and stop tokens.

    Raises:
        LlmtuneError: llama.cpp has no such tokenizer, or its stop tokens do not fit in the file.
    """
    directory = base.directory
    path = directory / TOKENIZER_NAME
    content = read_tokenizer_json(directory)
    pre = recognize_pre_tokenizer(content, path)
    rows, tokenizer = base.num_embedding_rows, base.tokenizer
    tokens, kinds = _tokens(content, rows, is_sentencepiece=pre.model == "llama")
    merges = _merges(content["model"])
    scores: tuple[float, ...] = ()
    if pre.model == "llama":
        scores = _scores(tokens, kinds, merges, path)
    trims_as_phi3 = _trims_as_phi3(content)
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        merges=() if scores else tuple(f"{left} {right}" for left, right in merges),
        scores=scores,
        special_ids=_special_ids(base),
        adds_bos=_adds(tokenizer, tokenizer.bos_token_id, first=True),
        adds_eos=_adds(tokenizer, tokenizer.eos_token_id, first=False),
        chat_template=_chat_template(tokenizer, directory),
        trims_as_phi3=trims_as_phi3,
        notices=(*pre.notices, *(() if trims_as_phi3 else _trimming(content))),
    )


def require_room_for_stops(base: Checkpoint) -> None:
    """Check that a file can name every token that ends an answer.

    Raises:
        LlmtuneError: there are too many.
    """
    tokenizer, stops = base.tokenizer, base.stop_token_ids
    if len({*stops} - {tokenizer.eos_token_id}) >= NUM_STOPS:
        named = tokenizer.convert_ids_to_tokens(list(stops))
        raise LlmtuneError(
            f"{base.directory}: {len(stops)} tokens end an answer ({', '.join(named)}), and a GGUF "
            f"file can name {NUM_STOPS}. Shorten eos_token_id in generation_config.json."
        )


def _tokens(
    content: Mapping[str, Any], rows: int, *, is_sentencepiece: bool
) -> tuple[tuple[str, ...], tuple[TokenKind, ...]]:
    """Return text and kind of every row; rows without a token are unused."""
    tokens = [f"[PAD{row}]" for row in range(rows)]
    kinds = [TokenKind.UNUSED] * rows
    unknown = content["model"].get("unk_token")
    for text, row in content["model"]["vocab"].items():
        tokens[row] = text
        kinds[row] = TokenKind.NORMAL
        if is_sentencepiece and text == unknown:
            kinds[row] = TokenKind.UNKNOWN
        elif is_sentencepiece and _is_byte(text):
            kinds[row] = TokenKind.BYTE
    for added in content.get("added_tokens", ()):
        row = added["id"]
        tokens[row] = added["content"]
        if kinds[row] != TokenKind.UNKNOWN:
            kinds[row] = TokenKind.CONTROL if added["special"] else TokenKind.USER_DEFINED
    return tuple(tokens), tuple(kinds)


def _is_byte(text: str) -> bool:
    return len(text) == len("<0x00>") and text.startswith("<0x") and text.endswith(">")


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the merges, best first: newer files hold pairs, older ones `left right`."""
    return [
        (merge[0], merge[1]) if isinstance(merge, list) else tuple(merge.split(" ", 1))
        for merge in model["merges"]
    ]


def _scores(
    tokens: Sequence[str],
    kinds: Sequence[TokenKind],
    merges: Sequence[tuple[str, str]],
    source: Path,
) -> tuple[float, ...]:
    """Return the score of each token: minus the rank of the first merge that makes it.

    llama.cpp joins any two neighbors whose text is a token, best score first; tokenizers joins
    listed pairs only, best rank first. Both do the same where every way to split a token into two
    tokens is a listed merge, as transformers writes them for sentencepiece models.

    Raises:
        LlmtuneError: there is a token that the two would join differently.
    """
    first_rank: dict[str, int] = {}
    pairs: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for rank, (left, right) in enumerate(merges):
        first_rank.setdefault(left + right, rank)
        pairs[left + right].add((left, right))
    plain = {text for text, kind in zip(tokens, kinds, strict=True) if kind == TokenKind.NORMAL}
    odd = [text for text in plain if not _splits(text, plain) <= pairs.get(text, set())]
    if odd:
        raise LlmtuneError(
            f"{source}: {len(odd)} tokens, such as {sorted(odd)[0]!r}, can be joined from other "
            "pieces than its merges say; llama.cpp would make other tokens. Do not export to GGUF."
        )
    return tuple(
        -float(first_rank[text])
        if text in first_rank
        else (0.0 if len(text) == 1 else LOWEST_SCORE)
        for text in tokens
    )


def _splits(text: str, plain: set[str]) -> set[tuple[str, str]]:
    cuts = ((text[:place], text[place:]) for place in range(1, len(text)))
    return {(left, right) for left, right in cuts if left in plain and right in plain}


def _special_ids(base: Checkpoint) -> dict[str, int]:
    """Return the ids by role; every stop token of the checkpoint is an end of something."""
    tokenizer, stops = base.tokenizer, base.stop_token_ids
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    require_room_for_stops(base)
    others = [stop for stop in stops if stop != tokenizer.eos_token_id]
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    return {role: id for role, id in ids.items() if id is not None}


def _adds(tokenizer: PreTrainedTokenizerFast, id: int | None, *, first: bool) -> bool:
    """Whether tokenizing a text puts this token before (or after) it, seen by doing it."""
    written: list[int] = tokenizer(PROBE)["input_ids"]
    plain = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if id is None or len(written) == len(plain):
        return False
    return written[0 if first else -1] == id


def _chat_template(tokenizer: PreTrainedTokenizerFast, directory: Path) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise LlmtuneError(
                f"{directory}: {len(template)} chat templates and none is named default; a GGUF "
                "file needs one."
            )
        template = template["default"]
    return template or None


def _trims_as_phi3(content: Mapping[str, Any]) -> bool:
    """Whether exactly the special tokens but three take the spaces after them, as in Phi-3."""
    added = content.get("added_tokens", ())
    names = {token["content"] for token in added}
    trimming = {token["content"] for token in added if token.get("rstrip")}
    return {"</s>", *PHI3_NEVER_TRIMS} <= names and trimming == names - PHI3_NEVER_TRIMS


def _trimming(content: Mapping[str, Any]) -> Iterator[str]:
    flags = ("lstrip", "rstrip", "single_word")
    odd = [
        added["content"]
        for added in content.get("added_tokens", ())
        if any(added.get(flag) for flag in flags)
    ]
    if odd:
        yield (
            f"{len(odd)} special tokens take the spaces beside them with them, such as {odd[0]!r}; "
            "llama.cpp keeps those spaces"
        )
