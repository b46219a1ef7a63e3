"""Recognize how a tokenizer.json cuts text into words, by llama.cpp's name for it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import LlmtuneError

# The patterns as they are in the tokenizer.json files of the models that brought them.
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
LLAMA3_PATTERN = rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_MARKS}|{_SPACES}"
QWEN2_PATTERN = rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_MARKS}|{_SPACES}"
QWEN35_PATTERN = (
    rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)

PIECES = "▁"
"""What represents a space in a sentencepiece vocabulary."""


@dataclass(frozen=True)
class PreTokenizer:
    """What llama.cpp needs to know to cut text as this tokenizer does."""

    model: str
    """`tokenizer.ggml.model`: `gpt2` is byte-level BPE, `llama` is sentencepiece BPE."""
    name: str
    """`tokenizer.ggml.pre`."""
    adds_space: bool = False
    """A space is put before the text (sentencepiece only)."""
    notices: tuple[str, ...] = ()


# {(the steps, whether a word that is a token is taken whole): llama.cpp's name}
BYTE_LEVEL = {
    (("byte-level words",), False): "gpt-2",
    (("digits", "byte-level words"), False): "smollm",
    ((f"split {LLAMA3_PATTERN}", "byte-level"), True): "llama-bpe",
    ((f"split {LLAMA3_PATTERN}", "byte-level"), False): "dbrx",
    ((f"split {QWEN2_PATTERN}", "byte-level"), False): "qwen2",
    ((f"split {QWEN35_PATTERN}", "byte-level"), False): "qwen35",
}


def recognize_pre_tokenizer(tokenizer: Mapping[str, Any], source: Path) -> PreTokenizer:
    """Return llama.cpp's name for the way `tokenizer` (a parsed tokenizer.json) cuts text.

    It is recognized by its structure, not by a hash of its output: tools rewrite tokenizer.json
    in ways that change nothing, and a new vocabulary does not change how words are cut.

    Raises:
        LlmtuneError: llama.cpp has no such pre-tokenizer, so its tokens would differ.
    """
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise _unknown(source, f"a {model['type']} model; expected BPE")
    odd = [
        name
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(name)
    ]
    if odd:
        raise _unknown(source, f"BPE with {', '.join(odd)}")
    if model.get("byte_fallback"):
        return _sentencepiece(tokenizer, source)
    steps = _steps(tokenizer.get("pre_tokenizer"), source)
    name = BYTE_LEVEL.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        raise _unknown(source, f"it cuts text by {' then '.join(steps) or 'nothing'}")
    normalizer = tokenizer.get("normalizer")
    if normalizer is None:
        return PreTokenizer("gpt2", name)
    if normalizer.get("type") == "NFC":
        notice = (
            "the tokenizer composes accents first (NFC) and llama.cpp does not: text with "
            "combining accents gets other tokens there"
        )
        return PreTokenizer("gpt2", name, notices=(notice,))
    raise _unknown(source, f"its normalizer is {normalizer.get('type')}")


def _steps(pre_tokenizer: Mapping[str, Any] | None, source: Path) -> tuple[str, ...]:
    if pre_tokenizer is None:
        return ()
    parts = [pre_tokenizer]
    if pre_tokenizer["type"] == "Sequence":
        parts = pre_tokenizer["pretokenizers"]
    return tuple(_step(part, source) for part in parts)


def _step(part: Mapping[str, Any], source: Path) -> str:
    kind = part["type"]
    if kind == "ByteLevel":
        if part.get("add_prefix_space"):
            raise _unknown(source, "it puts a space before every text (add_prefix_space)")
        return "byte-level words" if part.get("use_regex", True) else "byte-level"
    if kind == "Digits" and part.get("individual_digits"):
        return "digits"
    if kind == "Split" and "Regex" in part["pattern"]:
        behavior = (part.get("behavior"), bool(part.get("invert")))
        if behavior in {("Isolated", False), ("Removed", True)}:
            return f"split {part['pattern']['Regex']}"
    return f"{kind} { ({key: value for key, value in part.items() if key != 'type'}) }"


def _sentencepiece(tokenizer: Mapping[str, Any], source: Path) -> PreTokenizer:
    """Recognize what transformers makes of a sentencepiece BPE model."""
    normalizer, pre = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    parts = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    steps = [_normal_step(part) for part in parts]
    if pre is None or (pre["type"] == "Split" and pre["pattern"] == {"String": " "}):
        if steps == ["spaces"]:
            return PreTokenizer("llama", "default")
        if steps == ["prepend", "spaces"]:
            return PreTokenizer("llama", "default", adds_space=True)
    elif pre["type"] == "Metaspace" and not steps and not pre.get("split", True):
        scheme = pre.get("prepend_scheme", "always")
        if pre.get("replacement") == PIECES and scheme in {"always", "never", "first"}:
            return _metaspace(scheme)
    raise _unknown(source, f"sentencepiece with normalizer {normalizer} and pre-tokenizer {pre}")


def _metaspace(scheme: str) -> PreTokenizer:
    if scheme != "first":
        return PreTokenizer("llama", "default", adds_space=scheme == "always")
    notice = (
        "the tokenizer puts a space before a text but not after a special token; llama.cpp can "
        "only do both or neither, and does neither, which is right for chats"
    )
    return PreTokenizer("llama", "default", notices=(notice,))


def _normal_step(part: Mapping[str, Any]) -> str:
    step = str(part["type"])
    if step == "Prepend" and part.get("prepend") == PIECES:
        return "prepend"
    if step == "Replace" and part.get("pattern") == {"String": " "}:
        return "spaces" if part.get("content") == PIECES else step
    return step


def _unknown(source: Path, what: str) -> LlmtuneError:
    return LlmtuneError(
        f"{source}: llama.cpp has no pre-tokenizer for this tokenizer, so its tokens would differ: "
        f"{what}. Choose a base with a different tokenizer, or do not export to GGUF."
    )
