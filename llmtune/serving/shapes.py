"""The JSON of answers in the OpenAI protocol: whole or in chunks, one or several (light)."""

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmtune.data.pieces import HALF_CHARACTER
from llmtune.io.fingerprint import JsonObject, JsonValue


@dataclass(frozen=True)
class ShownToken:
    """A token's text with its log-probability, and those of the likeliest tokens at its place."""

    text: str
    log_probability: float
    likeliest: tuple[tuple[str, float], ...] = ()
    offset: int = 0
    """Where it begins in the answer, in characters; parts of one character begin where it does."""


@dataclass(frozen=True)
class SaidCall:
    """A call of a tool, its arguments as JSON text."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")

    def as_json(self) -> dict[str, JsonValue]:
        """Return it as the protocol has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Said:
    """The next text of an answer; the last one says how the answer ended."""

    text: str
    num_tokens: int = 0
    """Tokens written so far, without the stop token."""
    place: int = 0
    """Which of several answers it is of."""
    finish: str | None = None
    """Why the answer ended, in the protocol's words; None before its end."""
    tokens: tuple[ShownToken, ...] = ()
    """If they are asked for: the text's tokens."""
    calls: tuple[SaidCall, ...] = ()
    """Known at the answer's end."""


@dataclass
class Whole:
    """One answer, put together from what is said."""

    text: str = ""
    num_tokens: int = 0
    finish: str | None = None
    tokens: list[ShownToken] = field(default_factory=list)
    calls: tuple[SaidCall, ...] = ()

    def add(self, said: Said) -> None:
        """Take in the next text."""
        self.text += said.text
        self.tokens += said.tokens
        self.calls += said.calls
        self.num_tokens, self.finish = said.num_tokens, said.finish


@dataclass
class Shape:
    """The JSON of the answers to one request, whole or in chunks."""

    model: str
    is_chat: bool
    prompt_tokens: int
    with_tokens: bool = False
    """Whether log-probabilities were asked for."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: math.floor(time.time()))

    def whole(self, answers: Mapping[int, Whole]) -> JsonObject:
        """Return all answers in one piece."""
        choices = []
        for place, answer in sorted(answers.items()):
            choice = self._choice(place, answer.finish, answer.tokens)
            if self.is_chat:
                choice["message"] = _message(answer)
            else:
                choice["text"] = answer.text
            choices.append(choice)
        kind = "chat.completion" if self.is_chat else "text_completion"
        usage = self.usage(sum(answer.num_tokens for answer in answers.values()))
        return {**self._head(kind), "choices": choices, "usage": usage}

    def chunk(self, said: Said, *, is_first: bool = False) -> JsonObject:
        """Return the next piece of a stream; the first of a chat's answer says whose it is."""
        choice = self._choice(said.place, said.finish, said.tokens)
        if self.is_chat:
            delta: dict[str, JsonValue] = {"role": "assistant"} if is_first else {}
            if said.text or is_first:
                delta["content"] = said.text
            if said.calls:
                calls = [{"index": at, **call.as_json()} for at, call in enumerate(said.calls)]
                delta["tool_calls"] = calls
            choice["delta"] = delta
        else:
            choice["text"] = said.text
        return {**self._chunk_head(), "choices": [choice]}

    def usage_chunk(self, num_tokens: int) -> JsonObject:
        """Return the last chunk of a stream that asks for its usage."""
        return {**self._chunk_head(), "choices": [], "usage": self.usage(num_tokens)}

    def usage(self, num_tokens: int) -> dict[str, int]:
        """Return what was read and written, in tokens."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": self.prompt_tokens + num_tokens,
        }

    def _choice(
        self, place: int, finish: str | None, tokens: Sequence[ShownToken]
    ) -> dict[str, JsonValue]:
        shares = None
        if self.with_tokens and tokens:
            shares = _chat_shares(tokens) if self.is_chat else _text_shares(tokens)
        return {"index": place, "logprobs": shares, "finish_reason": finish}

    def _chunk_head(self) -> dict[str, JsonValue]:
        return self._head("chat.completion.chunk" if self.is_chat else "text_completion")

    def _head(self, kind: str) -> dict[str, JsonValue]:
        lead = "chatcmpl" if self.is_chat else "cmpl"
        return {
            "id": f"{lead}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


def _message(answer: Whole) -> JsonObject:
    """Return an answer as a message; beside calls a text of spaces alone is none."""
    is_empty = bool(answer.calls) and not answer.text.strip()
    message: dict[str, JsonValue] = {"role": "assistant", "refusal": None}
    message["content"] = None if is_empty else answer.text
    if answer.calls:
        message["tool_calls"] = [call.as_json() for call in answer.calls]
    return message


def _text_shares(tokens: Sequence[ShownToken]) -> JsonObject:
    """Return what a continued text says of its tokens."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.log_probability for token in tokens],
        "top_logprobs": [
            {token.text: token.log_probability} | dict(reversed(token.likeliest))
            for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }


def _chat_shares(tokens: Sequence[ShownToken]) -> JsonObject:
    """Return what a chat says of its tokens."""
    content = [
        {
            **_token_share(token.text, token.log_probability),
            "top_logprobs": [_token_share(*likely) for likely in token.likeliest],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _token_share(text: str, log_probability: float) -> dict[str, JsonValue]:
    """Return one token; the bytes of half a character are not known."""
    known = None if HALF_CHARACTER in text else list(text.encode("utf-8", "surrogatepass"))
    return {"token": text, "logprob": log_probability, "bytes": known}
