"""What a chat template does: its fingerprint, how it ends a turn, and which tokens stop."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2.exceptions import TemplateError

from llmtune.data.problems import RowError
from llmtune.data.render import encode_plain, render_text, require_template
from llmtune.errors import LlmtuneError
from llmtune.fingerprint import hash_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GOLDEN_MESSAGES = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "Sind Sie sicher? 確か？\n\n  - yes\n  - no"},
]
GOLDEN_DATE = "01 Jan 2025"
"""Templates that print today's date read this variable first, so the golden prompt stays."""

QUESTION = "Which number comes after twelve?"
ANSWER = "Thirteen, of course"


@dataclass(frozen=True)
class TemplateIdentity:
    """What must be equal for two commands to render the same prompt."""

    template_hash: str
    """SHA-256 of the template's text and the special tokens it can print."""
    golden_prompt_ids: tuple[int, ...]
    """The ids of one fixed chat with its generation prompt: the template and tokenizer at work."""

    def to_json(self) -> dict[str, Any]:
        """Return the identity as JSON values."""
        return {
            "template_hash": self.template_hash,
            "golden_prompt_ids": list(self.golden_prompt_ids),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TemplateIdentity:
        """Read what `to_json` wrote."""
        return cls(value["template_hash"], tuple(value["golden_prompt_ids"]))


def template_fingerprint(tokenizer: PreTrainedTokenizerFast) -> TemplateIdentity:
    """Return the identity of a tokenizer's chat template, for the adapter's manifest.

    Without a template the golden prompt is the plain text, so the tokenizer is still compared.
    """
    special = {"bos": str(tokenizer.bos_token), "eos": str(tokenizer.eos_token)}
    template = tokenizer.chat_template or ""
    if template:
        try:
            ids = tokenizer.apply_chat_template(
                GOLDEN_MESSAGES,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                date_string=GOLDEN_DATE,
            )
        except (TemplateError, TypeError) as error:
            raise LlmtuneError(
                f"the chat template cannot render a plain two-turn chat: {error}"
            ) from error
    else:
        ids = encode_plain(tokenizer, "\n".join(turn["content"] for turn in GOLDEN_MESSAGES))
    return TemplateIdentity(
        template_hash=hash_json({"template": template, "special": special}),
        golden_prompt_ids=tuple(ids),
    )


def require_same_template(tokenizer: PreTrainedTokenizerFast, identity: TemplateIdentity) -> None:
    """Refuse a tokenizer that would render another prompt than the one of training.

    Raises:
        LlmtuneError: what differs: the template's text, or the ids it leads to.
    """
    now = template_fingerprint(tokenizer)
    if now == identity:
        return
    what = "chat template or special tokens have"
    if now.template_hash == identity.template_hash:
        what = "tokenization has"
    raise LlmtuneError(
        f"the tokenizer's {what} changed since this adapter was trained (template "
        f"{identity.template_hash[:12]}, now {now.template_hash[:12]}; the golden prompt is "
        f"{'the same' if now.golden_prompt_ids == identity.golden_prompt_ids else 'different'}). "
        "The model would see prompts it was not trained on: use the tokenizer files saved with "
        "the adapter"
    )


@dataclass(frozen=True)
class TurnEnding:
    """How a template ends an assistant turn, found by rendering a known one.

    `closed`: a special token follows the answer (ChatML, Llama 3, Mistral, Gemma).
    `next-turn`: the special token that opens the next turn ends this one (GLM).
    `none`: no special token at all; the tokenizer's end-of-text is put after each answer.
    """

    kind: Literal["closed", "next-turn", "none"]
    terminator: str
    terminator_id: int
    lead: str
    """What the template writes between its generation prompt and the answer (an empty
    `<think>` block, a space)."""
    tail: str
    """What it writes after the answer of a chat's last turn."""
    stop_ids: tuple[int, ...]
    """Every token that ends generation: the tokenizer's end-of-text, then the template's own."""
    stop_texts: tuple[str, ...]
    """The same as text."""


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return every token id that ends a turn: give it to generation and to all saved configs."""
    if not tokenizer.chat_template:
        return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(find_turn_ending(tokenizer).stop_ids)


def find_turn_ending(tokenizer: PreTrainedTokenizerFast) -> TurnEnding:
    """Render a known exchange and return how its answer ends.

    Raises:
        LlmtuneError: no template, a template that cannot render a user and an assistant turn or
            that writes two beginning-of-text tokens, or no token at all that could end a turn.
    """
    require_template(tokenizer)
    asked = [{"role": "user", "content": QUESTION}]
    answered = [*asked, {"role": "assistant", "content": ANSWER}]
    try:
        prompt = render_text(tokenizer, asked, add_generation_prompt=True)
        text = render_text(tokenizer, answered)
        longer = render_text(tokenizer, [*answered, *asked])
    except RowError as error:
        raise LlmtuneError(f"{error}; expected a template for user and assistant turns") from error
    _refuse_double_bos(tokenizer, text)
    if ANSWER not in text or QUESTION not in prompt:
        raise LlmtuneError("the chat template does not print the messages' content")
    position = text.rindex(ANSWER)
    tail = text[position + len(ANSWER) :]
    lead = text[len(prompt) : position] if text.startswith(prompt) else ""
    specials = special_pattern(tokenizer)
    closing = specials.search(tail)
    opening = specials.search(longer[longer.index(ANSWER) + len(ANSWER) :])
    kind: Literal["closed", "next-turn", "none"]
    if closing:
        kind, terminator = "closed", closing.group()
    elif opening:
        kind, terminator = "next-turn", opening.group()
    elif tokenizer.eos_token:
        kind, terminator = "none", str(tokenizer.eos_token)
    else:
        raise LlmtuneError(
            "neither the chat template nor the tokenizer has a token that ends a turn, so the "
            "tuned model could never stop; set eos_token in tokenizer_config.json"
        )
    terminator_id = tokenizer.convert_tokens_to_ids(terminator)
    ids = [tokenizer.eos_token_id, terminator_id, _tool_opening(tokenizer, answered, kind)]
    stop_ids = tuple(dict.fromkeys(token for token in ids if token is not None))
    return TurnEnding(
        kind=kind,
        terminator=terminator,
        terminator_id=terminator_id,
        lead=lead,
        tail=tail,
        stop_ids=stop_ids,
        stop_texts=tuple(tokenizer.convert_ids_to_tokens(list(stop_ids))),
    )


def special_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Return a pattern for the tokenizer's control tokens, the longest first."""
    tokens = {
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    } | {str(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    ordered = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def _tool_opening(
    tokenizer: PreTrainedTokenizerFast, answered: list[dict], kind: str
) -> int | None:
    """Return the token that ends a turn followed by a tool's answer, for `next-turn` templates."""
    if kind != "next-turn":
        return None
    try:
        text = render_text(tokenizer, [*answered, {"role": "tool", "content": QUESTION}])
    except RowError:
        return None  # a template without tools has no such token
    opening = special_pattern(tokenizer).search(text[text.index(ANSWER) + len(ANSWER) :])
    return tokenizer.convert_tokens_to_ids(opening.group()) if opening else None


def _refuse_double_bos(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    bos = str(tokenizer.bos_token or "")
    if bos and text.startswith(bos + bos):
        raise LlmtuneError(
            f"the chat template writes the beginning-of-text token {bos!r} twice; take one out"
        )
