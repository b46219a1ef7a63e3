"""Requests for an engine with a server of its own: read strictly, because it drops what it ignores.

llama.cpp's server takes an unknown name, a wrong type, or any model's name without a word, and
vLLM's writes a line into its log. Here each parameter is known to be followed, or it is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, create_model

from llmtune.io.fingerprint import JsonObject
from llmtune.serving.openai_api import (
    COMPLETION_TOKENS,
    ChatBody,
    CompletionBody,
    chat_limit,
    check_shared,
    require_name,
    validate_body,
)

Penalty = Annotated[float, Field(ge=-2, le=2)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]

TYPES: Mapping[str, Any] = {
    "bad_words": list[str],
    "frequency_penalty": Penalty,
    "grammar": str,
    "ignore_eos": bool,
    "logit_bias": dict[str, float],
    "logprobs": bool,
    "min_p": Share,
    "min_tokens": Count,
    "n": Annotated[int, Field(ge=1, le=128)],
    "parallel_tool_calls": bool,
    "presence_penalty": Penalty,
    "repeat_last_n": Annotated[int, Field(ge=-1)],
    "repeat_penalty": Annotated[float, Field(gt=0)],
    "repetition_penalty": Annotated[float, Field(gt=0)],
    "response_format": dict[str, Any],
    "stop_token_ids": list[int],
    "tool_choice": Literal["none", "auto", "required"] | dict[str, Any],
    "tools": list[dict[str, Any]],
    "top_k": Annotated[int, Field(ge=-1)],
    "top_logprobs": Annotated[int, Field(ge=0, le=20)],
    "typical_p": Share,
}
"""What a value must be, of every parameter that an engine may follow beside those of all."""
IN_COMPLETIONS: Mapping[str, Any] = {"logprobs": Count}
"""What is different in a request that continues a text."""


@dataclass(frozen=True)
class Follows:
    """The parameters that an engine follows beside those that all of them do (see `TYPES`)."""

    chat: frozenset[str]
    completion: frozenset[str]


@dataclass(frozen=True)
class PassedOn:
    """A request that was read, as the engine gets it."""

    path: str
    body: JsonObject
    model: str
    is_stream: bool


def read_for_engine(
    body: Any, follows: Follows, names: Sequence[str], temperature: float, *, is_chat: bool
) -> PassedOn:
    """Read a request; what it leaves to the server is filled in, as the other engines do.

    Raises:
        RefusedRequest: it is not one, names no model that is here, or asks for what the engine
            would drop.
    """
    more = follows.chat if is_chat else follows.completion
    types = TYPES if is_chat else {**TYPES, **IN_COMPLETIONS}
    base = ChatBody if is_chat else CompletionBody
    fields: dict[str, Any] = {name: (types[name] | None, None) for name in sorted(more)}
    read = validate_body(create_model("Body", __base__=base, **fields), body)
    check_shared(read)
    if isinstance(read, ChatBody):
        chat_limit(read)
    model = require_name(read.model, names)
    given = {name: value for name, value in body.items() if value is not None}
    filled = {"temperature": temperature, **given, "model": model}
    if not is_chat:
        filled = {"max_tokens": COMPLETION_TOKENS, **filled}
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    return PassedOn(path, filled, model, bool(read.stream))
