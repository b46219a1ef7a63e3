"""How a chat template ends an assistant turn, and so which tokens stop a model that uses it."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmtune.errors import LlmtuneError
from llmtune.models.chat_template import TEMPLATE_ERRORS, apply_chat_template
from llmtune.models.thinking import THINKING, lead_behind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

QUESTION = "Which number comes after twelve?"
ANSWER = "Thirteen, of course"
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a number up.",
        "parameters": {
            "type": "object",
            "properties": {"number": {"type": "string", "description": "the number"}},
            "required": ["number"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"number": ANSWER}}}


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
    opening: str
    """What opens an assistant's turn, in the generation prompt and in a finished turn alike."""
    written_lead: str
    """What a finished turn has between its opening and the answer."""
    lead: str
    """What is trained between the generation prompt and the answer: an empty `<think>` block, a
    space, or what closes a block of thinking that the prompt opened."""
    tail: str
    """What it writes after the answer of a chat's last turn."""
    call_terminator: str
    """What ends a last turn of tool calls that the template itself leaves open."""
    stop_ids: tuple[int, ...]
    """Every token that ends generation: the tokenizer's end-of-text, then the template's own."""
    stop_texts: tuple[str, ...]
    """The same as text."""
    controls: re.Pattern[str]
    """The control tokens, and whatever else opens a turn: no text may hold one."""


def stop_token_ids(
    tokenizer: PreTrainedTokenizerFast, generation_config: Any = None
) -> tuple[int, ...]:
    """Return every id that ends an answer, ascending: end of text, generation config, end of turn.

    This is the one list: training closes turns with tokens of it, generation ends at them, and it
    is written into everything that is saved. A template that cannot render a user and an assistant
    turn adds nothing; `find_turn_ending` says what is wrong with it where it is needed.

    Args:
        tokenizer: as `load_tokenizer` returns it.
        generation_config: a transformers GenerationConfig, its dict, or None.
    """
    if isinstance(generation_config, Mapping):
        configured = generation_config.get("eos_token_id")
    else:
        configured = getattr(generation_config, "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *as_ids(configured)}
    if tokenizer.chat_template:
        with contextlib.suppress(LlmtuneError):
            stops |= {*find_turn_ending(tokenizer).stop_ids}
    return tuple(sorted(stop for stop in stops if stop is not None))


def find_turn_ending(tokenizer: PreTrainedTokenizerFast) -> TurnEnding:
    """Render a known exchange and return how its answer ends.

    Raises:
        LlmtuneError: no template, a template that cannot render a user and an assistant turn or
            that writes two beginning-of-text tokens, or no token at all that could end a turn.
    """
    require_chat_template(tokenizer)
    asked = [{"role": "user", "content": QUESTION}]
    answered = [*asked, {"role": "assistant", "content": ANSWER}]
    prompt = _render(tokenizer, asked, add_generation_prompt=True)
    text = _render(tokenizer, answered)
    longer = _render(tokenizer, [*answered, *asked])
    _refuse_double_bos(tokenizer, text)
    alone = _render(tokenizer, asked)
    prints = all(QUESTION in known for known in (prompt, text, alone)) and ANSWER in longer
    if not prints or text.rfind(ANSWER) < text.rfind(QUESTION):
        raise LlmtuneError("the chat template does not print the messages' content")
    position = text.rindex(ANSWER)
    tail = text[position + len(ANSWER) :]
    specials = special_pattern(tokenizer)
    turn_opening, written_lead = _find_opening(tokenizer, alone, (prompt, text))
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
    texts = [tokenizer.eos_token, terminator]
    call_terminator = terminator
    if kind == "next-turn":
        call_terminator = _tool_opening(tokenizer, answered, specials) or terminator
        texts.append(call_terminator)
    elif kind == "closed":
        texts.append(_call_closing(tokenizer, asked, [text for text in texts if text], specials))
    stop_texts = tuple(dict.fromkeys(str(text) for text in texts if text))
    return TurnEnding(
        kind=kind,
        terminator=terminator,
        terminator_id=tokenizer.convert_tokens_to_ids(terminator),
        opening=turn_opening,
        written_lead=written_lead,
        lead=text[len(prompt) : position]
        if text.startswith(prompt)
        else lead_behind(prompt, written_lead),
        tail=tail,
        call_terminator=call_terminator,
        stop_ids=tuple(tokenizer.convert_tokens_to_ids(list(stop_texts))),
        stop_texts=stop_texts,
        controls=control_pattern(tokenizer),
    )


def special_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Return a pattern for the tokenizer's control tokens, the longest first."""
    tokens = {
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    } | {str(token) for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
    ordered = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, ordered)) or "(?!)")


def control_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Return a pattern for what must not be typed inside a text: it would end or open a turn.

    Besides the control tokens these are the added tokens around a plain chat's turns, whether or
    not the tokenizer calls them special (DeepSeek's are not); marks of thinking may be typed.
    """
    specials = special_pattern(tokenizer)
    asked = {"role": "user", "content": QUESTION}
    answered = [asked, {"role": "assistant", "content": ANSWER}, asked]
    try:
        text = _render(tokenizer, answered)
    except LlmtuneError:
        return specials  # refused by whoever needs the template, with its reason
    frame = "\n".join(re.split(f"{re.escape(QUESTION)}|{re.escape(ANSWER)}", text))
    written = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if not token.special
        and token.content.strip()
        and token.content in frame
        and not THINKING.search(token.content)
    ]
    if not written:
        return specials
    return re.compile("|".join([specials.pattern, *map(re.escape, written)]))


def require_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a tokenizer without a chat template: which one to use is the user's choice."""
    if not tokenizer.chat_template:
        raise LlmtuneError(
            "this base model's tokenizer has no chat template, so a chat has no defined form. "
            "Choose one: model.chat_template=FILE.jinja, or rows that need none (documents, or "
            "prompts and completions with render: plain)"
        )


def as_ids(value: int | Iterable[int] | None) -> list[int]:
    """Return the ids of a config's `eos_token_id`: one, several, or none."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _render(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    try:
        text: str = apply_chat_template(
            tokenizer, messages, tools=tools, add_generation_prompt=add_generation_prompt
        )
    except TEMPLATE_ERRORS as error:
        roles = ", ".join(message["role"] for message in messages)
        raise LlmtuneError(
            f"the chat template refuses a plain chat ({error}); its roles are {roles}; expected a "
            "template for user and assistant turns"
        ) from error
    return text


def _find_opening(
    tokenizer: PreTrainedTokenizerFast, alone: str, texts: tuple[str, str]
) -> tuple[str, str]:
    """Return what opens an assistant's turn and what a finished turn has after it.

    `alone` is the known question, `texts` the same with the generation prompt, and with its answer.
    What both have after the question's own end is the opening; a block of thinking is not part of
    it.
    """
    prompt, text = (known[known.rindex(QUESTION) + len(QUESTION) :] for known in texts)
    before = text[: text.rindex(ANSWER)]
    end = shared_length(tokenizer, alone[alone.rindex(QUESTION) + len(QUESTION) :], before)
    prompt, before = prompt[end:], before[end:]
    shared = before[: shared_length(tokenizer, prompt, before)]
    thinking = THINKING.search(shared)
    opening = shared[: thinking.start()] if thinking else shared
    return opening, before[len(opening) :]


def shared_length(tokenizer: PreTrainedTokenizerFast, one: str, other: str) -> int:
    """Return how many characters two texts share from the start, without half a token."""
    length = len(os.path.commonprefix([one, other]))
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    tokens = re.compile("|".join([THINKING.pattern, *map(re.escape, added)]))
    cut = [m.start() for m in tokens.finditer(other) if m.start() < length < m.end()]
    return min([length, *cut])


def _tool_opening(
    tokenizer: PreTrainedTokenizerFast, answered: list[dict[str, Any]], specials: re.Pattern[str]
) -> str | None:
    """Return the token that ends a turn followed by a tool's answer, for `next-turn` templates."""
    try:
        text = _render(tokenizer, [*answered, {"role": "tool", "content": QUESTION}])
    except LlmtuneError:
        return None  # a template without tools has no such token
    opening = specials.search(text[text.rfind(ANSWER) + len(ANSWER) :])
    return opening.group() if opening else None


def _call_closing(
    tokenizer: PreTrainedTokenizerFast,
    asked: list[dict[str, Any]],
    known: list[str],
    specials: re.Pattern[str],
) -> str | None:
    """Return the token that ends a turn of tool calls where none of the `known` ones does."""
    text = ""
    written = {**CALL, "function": {"name": "look_up", "arguments": f'{{"number": "{ANSWER}"}}'}}
    for call, content in itertools.product((CALL, written), ("", None)):
        calling = {"role": "assistant", "content": content, "tool_calls": [call]}
        with contextlib.suppress(LlmtuneError):  # a template without tools has no such token
            text = _render(tokenizer, [*asked, calling], tools=[TOOL])
        if ANSWER in text:
            break
    position = text.rfind(ANSWER)
    rest = text[position + len(ANSWER) :]
    if position < 0 or any(stop in rest for stop in known):
        return None
    closings = specials.findall(rest)
    return closings[-1] if closings else None


def _refuse_double_bos(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    bos = str(tokenizer.bos_token or "")
    if bos and re.match(rf"\s*{re.escape(bos)}\s*{re.escape(bos)}", text):
        raise LlmtuneError(
            f"the chat template writes the beginning-of-text token {bos!r} twice; take one out"
        )
