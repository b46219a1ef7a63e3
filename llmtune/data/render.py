"""The one renderer: messages become token ids through the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmtune.data.pieces import PIECE_CHARACTERS, encode_long
from llmtune.data.problems import RowError
from llmtune.data.tool_form import find_tool_form
from llmtune.errors import LlmtuneError
from llmtune.models.chat_template import TEMPLATE_ERRORS, apply_chat_template
from llmtune.models.turns import require_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llmtune.data.conversation import Message

TRAINING_KEYS = ("train", "weight")
"""Message keys that speak to the trainer: the template never sees them."""


def render_messages(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> list[int]:
    """Return the token ids of a chat, as training, evaluation, chat and export all use them.

    The tokenizer adds no special tokens of its own, so a beginning-of-text token is there once or
    not at all, exactly as the template writes it.

    Raises:
        LlmtuneError: the tokenizer has no chat template, or the template refuses this chat.
    """
    require_chat_template(tokenizer)
    try:
        ids = apply_chat_template(
            tokenizer,
            _shape_messages(tokenizer, messages),
            tools=_shape_tools(tokenizer, tools),
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
        )
    except TEMPLATE_ERRORS as error:
        raise LlmtuneError(f"the chat template cannot render these messages: {error}") from error
    return list(ids)


def render_text(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Return the text that `render_messages` tokenizes.

    Raises:
        RowError: the template refuses this chat; the message is the template's own.
    """
    try:
        text: str = apply_chat_template(
            tokenizer,
            _shape_messages(tokenizer, messages),
            tools=_shape_tools(tokenizer, tools),
            add_generation_prompt=add_generation_prompt,
        )
    except TEMPLATE_ERRORS as error:
        if not messages:
            raise RowError(
                "the first message is the assistant's and is trained, but the template has no "
                f"prompt for it ({error}); put a user's turn before it, or give it train: false",
                "template",
            ) from error
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise RowError(
            f"the chat template refuses this chat ({error}); its roles are {roles}", "template"
        ) from error
    return text


def render_texts(
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[tuple[list[Message], list[dict[str, Any]] | None]],
    *,
    add_generation_prompt: bool,
) -> list[str | RowError]:
    """Return `render_text` of many `(messages, tools)`; a refused one gives its error."""
    plain = [index for index, (_, tools) in enumerate(chats) if tools is None]
    texts: dict[int, str | RowError] = {}
    if plain:
        try:
            together = apply_chat_template(
                tokenizer,
                [_shape_messages(tokenizer, chats[index][0]) for index in plain],
                add_generation_prompt=add_generation_prompt,
            )
            texts = dict(zip(plain, together, strict=True))
        except TEMPLATE_ERRORS:
            pass  # one of them is refused: the loop below finds out which
    for index, (messages, tools) in enumerate(chats):
        if index not in texts:
            try:
                texts[index] = render_text(
                    tokenizer, messages, tools=tools, add_generation_prompt=add_generation_prompt
                )
            except RowError as error:
                texts[index] = error
    return [texts[index] for index in range(len(chats))]


def render_question(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """Return the ids of a user's question, ready to be answered; plain without a template."""
    if not tokenizer.chat_template:
        return encode_plain(tokenizer, question)
    messages = [{"role": "user", "content": question}]
    return render_messages(tokenizer, messages, add_generation_prompt=True)


def encode_plain(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of text that goes through no template.

    The tokenizer's own beginning-of-text token is added where it adds one, never a second time.
    """
    if len(text) > PIECE_CHARACTERS:
        ids = encode_long(tokenizer, text)
        ids[:0] = leading_special_ids(tokenizer)
    else:
        ids = list(tokenizer(text, return_attention_mask=False)["input_ids"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    # Some post-processors also close the text; whoever continues it must not see an end.
    bare = tokenizer(text[-1:], add_special_tokens=False)["input_ids"]
    if len(ids) > 1 and eos is not None and ids[-1] == eos and bare[-1:] != [eos]:
        ids = ids[:-1]
    return ids


def leading_special_ids(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Return the ids that the tokenizer puts before a text by itself: the BOS, or nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    starts = [s for s in range(len(full) - len(plain) + 1) if full[s : s + len(plain)] == plain]
    return tuple(full[: starts[0]]) if starts else ()


def _shape_messages(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Return a chat as the template takes it: no keys for the trainer, calls in its own form."""
    shaped = [strip_training_keys(message) for message in messages]
    if any("tool_calls" in message for message in shaped):
        return find_tool_form(tokenizer).shape_messages(shaped)
    return shaped


def _shape_tools(
    tokenizer: PreTrainedTokenizerFast, tools: list[dict[str, Any]] | None
) -> list[dict[str, Any]] | None:
    return find_tool_form(tokenizer).shape_tools(tools) if tools else None


def strip_training_keys(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `message` without the keys that only the trainer reads."""
    if "train" in message or "weight" in message:  # any() over the keys costs ten times as much
        return {key: value for key, value in message.items() if key not in TRAINING_KEYS}
    return message
