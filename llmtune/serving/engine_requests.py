"""Requests for an engine with a server of its own: read strictly, because it drops what it ignores.

llama.cpp's server takes an unknown name, a wrong type, or any model's name without a word, and
vLLM's writes a line into its log. Here each parameter is known to be followed, or it is refused.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, cast

from pydantic import Field, create_model

from llmtune.io.fingerprint import JsonObject
from llmtune.serving.openai_api import (
    COMPLETION_TOKENS,
    ChatBody,
    CompletionBody,
    RefusedRequest,
    SharedBody,
    chat_limit,
    check_choice,
    check_shared,
    read_messages,
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
    if_repeatable: JsonObject = field(default_factory=dict)
    """Keys of its own that make it repeat an answer: sent with a seed, and at temperature 0."""
    why_not: Mapping[str, str] = field(default_factory=dict)
    """Reasons why this model does not follow a parameter that the engine follows otherwise."""

    def without(self, names: Collection[str], reason: str) -> "Follows":
        """Return what is followed by a model that has no use for these parameters."""
        return replace(
            self,
            chat=self.chat - set(names),
            completion=self.completion - set(names),
            why_not={**self.why_not, **dict.fromkeys(names, reason)},
        )


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
    kind = cast("type[SharedBody]", create_model("Body", __base__=base, **fields))
    read = validate_body(kind, body, follows.why_not)
    check_shared(read)
    if isinstance(read, ChatBody):
        chat_limit(read)
        read_messages(read.messages)
    check_choice(body.get("tool_choice"), body.get("tools"))
    _check_form(body.get("response_format"))
    model = require_name(read.model, names)
    fields_read = kind.model_fields  # what asks for nothing is not passed on
    given = {key: value for key, value in body.items() if value is not None and key in fields_read}
    filled = {"temperature": temperature, **given, "model": model}
    if not is_chat:
        filled = {"max_tokens": COMPLETION_TOKENS, **filled}
    if filled.get("seed") is not None or not filled["temperature"]:
        filled = {**filled, **follows.if_repeatable}
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    return PassedOn(path, filled, model, bool(read.stream))


def _check_form(form: Any) -> None:
    """Refuse a form of the answer that is named and not described."""
    if form is None:
        return
    if form.get("type") not in ("text", "json_object", "json_schema"):
        shown = json.dumps(form.get("type"))
        raise RefusedRequest(
            400,
            f"response_format: type is {shown}; expected text, json_object or json_schema",
            param="response_format",
        )
    described = form.get("json_schema")
    has_schema = isinstance(described, Mapping) and isinstance(described.get("schema"), Mapping)
    if form["type"] == "json_schema" and not has_schema:
        raise RefusedRequest(
            400,
            'response_format: json_schema holds no schema; expected {"name": ..., "schema": {...}}',
            param="response_format",
        )
