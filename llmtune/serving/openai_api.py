"""The OpenAI protocol: requests read strictly, refused in its shape (light)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llmtune.data.conversation import Conversation, ask
from llmtune.data.problems import RowError, did_you_mean
from llmtune.io.fingerprint import JsonObject

COMPLETION_TOKENS = 16
"""What the protocol writes to a bare prompt if the request does not say how much."""
MAX_STOPS = 16
MAX_ANSWERS = 128
MAX_LIKELIEST = 20
BEARER = "Bearer "

NO_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Parameters of the protocol that change no answer, or none where tools are not followed."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Parameters that are not followed -> the values that ask for nothing."""
HINTS = {
    "chat_template_kwargs": "the template is called as the model was trained; "
    "set model.template_arguments and train again",
    "response_format": "answers are not constrained to a form",
    "top_k": "use top_p",
}


@dataclass(frozen=True)
class AnswerRequest:
    """One request, checked: a chat that waits for an answer, or a text that is continued."""

    model: str | None
    question: Conversation | None = None
    prompt: str | tuple[int, ...] = ""
    """Without a question: what is continued, as text or as token ids."""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    with_usage: bool = False
    num_answers: int = 1
    num_likeliest: int | None = None
    """How many likeliest tokens come with each one that is written; None: no log-probabilities."""

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat."""
        return self.question is not None


class RefusedRequest(Exception):
    """A request that is not answered, with what the client is told."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def as_json(self) -> JsonObject:
        """Return the protocol's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


class _StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class SharedBody(BaseModel):
    """What chats and bare prompts are asked with; null is the same as left out."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


class ChatBody(SharedBody):
    """What a chat is asked with."""

    messages: list[Any]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class CompletionBody(SharedBody):
    """What a bare prompt is continued with."""

    prompt: str | list[str] | list[int] | list[list[int]]


class LiveChatBody(ChatBody):
    """What a chat with a loaded model is asked with."""

    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LIKELIEST)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class LiveCompletionBody(CompletionBody):
    """What a bare prompt is continued with by a loaded model."""

    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LIKELIEST)] | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _read_false(cls, value: Any) -> Any:
        """Take false, which chats send, for null."""
        return None if value is False else value


def read_chat(body: Any, temperature: float) -> AnswerRequest:
    """Read the body of `/v1/chat/completions`.

    Args:
        temperature: of a request that names none.

    Raises:
        RefusedRequest: it is not one, or asks for what would be dropped.
    """
    read = validate_body(LiveChatBody, body)
    limit = chat_limit(read)
    if read.top_logprobs and not read.logprobs:
        raise RefusedRequest(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    check_choice(read.tool_choice, read.tools)
    if read.tools and read.tool_choice not in (None, "auto", "none"):
        raise RefusedRequest(
            400, "tool_choice: nothing makes the model call; send auto or none", param="tool_choice"
        )
    if read.tools and read.parallel_tool_calls is False:
        raise RefusedRequest(
            400,
            "parallel_tool_calls: nothing keeps the model from several calls; take it out",
            param="parallel_tool_calls",
        )
    tools = None if read.tool_choice == "none" else read.tools
    return replace(
        _shared(read, limit, temperature),
        question=read_messages(read.messages, tools),
        num_answers=read.n or 1,
        num_likeliest=(read.top_logprobs or 0) if read.logprobs else None,
    )


def check_choice(choice: Any, tools: Any) -> None:
    """Refuse a choice among tools if there are none."""
    if choice not in (None, "none", "auto") and not tools:
        raise RefusedRequest(400, "tool_choice needs tools", param="tool_choice")


def read_messages(
    messages: Sequence[Any], tools: Sequence[Mapping[str, Any]] | None = None
) -> Conversation:
    """Return a chat that waits for an answer.

    Raises:
        RefusedRequest: it is not one, or holds what a template would leave out without a word.
    """
    try:
        return ask(messages, None if tools is None else list(tools))
    except RowError as error:
        param = "tools" if error.kind == "tools" else "messages"
        raise RefusedRequest(400, str(error), param=param) from None


def chat_limit(read: ChatBody) -> int | None:
    """Return the longest answer that a chat asks for, in tokens.

    Raises:
        RefusedRequest: it says two lengths, or nothing.
    """
    if not read.messages:
        raise RefusedRequest(
            400, "messages is empty; expected at least one of the user", param="messages"
        )
    if read.max_tokens is not None and read.max_completion_tokens not in (None, read.max_tokens):
        raise RefusedRequest(
            400, "max_tokens and max_completion_tokens differ; give one", param="max_tokens"
        )
    return read.max_completion_tokens or read.max_tokens


def read_completion(body: Any, temperature: float) -> AnswerRequest:
    """Read the body of `/v1/completions`.

    Raises:
        RefusedRequest: it is not one, or asks for what would be dropped.
    """
    read = validate_body(LiveCompletionBody, body)
    prompt: Any = read.prompt
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise RefusedRequest(
                400, f"{len(prompt)} prompts in one request; send one each", param="prompt"
            )
        prompt = prompt[0]
    if not prompt:
        raise RefusedRequest(400, "prompt is empty; there is nothing to continue", param="prompt")
    prompt = prompt if isinstance(prompt, str) else tuple(prompt)
    limit = read.max_tokens or COMPLETION_TOKENS
    return replace(
        _shared(read, limit, temperature),
        prompt=prompt,
        num_answers=read.n or 1,
        num_likeliest=read.logprobs,
    )


Body = TypeVar("Body", bound=SharedBody)


def validate_body(
    kind: type[Body], body: Any, why_not: Mapping[str, str] = MappingProxyType({})
) -> Body:
    """Return the body as `kind`, whose fields are the parameters that are followed.

    Args:
        why_not: reasons for what is not followed, beside `HINTS`.

    Raises:
        RefusedRequest: a parameter is missing, is not what it must be, or is not followed.
    """
    if not isinstance(body, dict):
        raise RefusedRequest(400, "the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    known = set(kind.model_fields)
    for name, value in given.items():
        if name not in known:
            _check_extra(name, value, known, {**HINTS, **why_not})
    try:
        return kind.model_validate({name: given[name] for name in given if name in known})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        if first["type"] == "missing":
            raise RefusedRequest(400, f"{name} is missing", param=name) from None
        shown = json.dumps(given[name], default=str)[:80]
        raise RefusedRequest(400, f"{name} is {shown}: {first['msg']}", param=name) from None


def _check_extra(name: str, value: Any, known: set[str], hints: Mapping[str, str]) -> None:
    """Refuse a parameter that would change the answer and is not followed."""
    if name in NO_EFFECT:
        return
    neutral = NEUTRAL.get(name, ())
    if any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral):
        return
    hint = f": {hints[name]}" if name in hints else ""
    if name in NEUTRAL or hint:
        what = f"{name} is not supported here{hint}"
    else:
        near = did_you_mean(name, [*known, *NEUTRAL, *NO_EFFECT])
        what = f"unknown parameter {name}{near}"
    raise RefusedRequest(400, f"{what}; take it out", param=name, code="unsupported_parameter")


def check_shared(read: SharedBody) -> tuple[str, ...]:
    """Return the texts that end the answer.

    Raises:
        RefusedRequest: the request contradicts itself.
    """
    stops = (read.stop,) if isinstance(read.stop, str) else tuple(read.stop or ())
    if len(stops) > MAX_STOPS or not all(stops):
        raise RefusedRequest(
            400, f"stop: expected at most {MAX_STOPS} texts, none empty", param="stop"
        )
    if read.stream_options is not None and not read.stream:
        raise RefusedRequest(400, "stream_options needs stream: true", param="stream_options")
    return stops


def _shared(read: SharedBody, limit: int | None, temperature: float) -> AnswerRequest:
    stops = check_shared(read)
    options = read.stream_options
    return AnswerRequest(
        model=read.model,
        max_tokens=limit,
        temperature=temperature if read.temperature is None else read.temperature,
        top_p=1.0 if read.top_p is None else read.top_p,
        seed=read.seed,
        stop=stops,
        stream=bool(read.stream),
        with_usage=options is not None and options.include_usage,
    )


class StopTexts:
    """Cuts a stream at the first of some texts; what may become one of them is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str, *, is_last: bool = False) -> str:
        """Return what may be shown now."""
        if not self._stops or self.found:
            return "" if self.found else text
        held = self._held + text
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.found = True
            self._held = ""
            return held[: min(places)]
        keep = 0 if is_last else max(_overlap(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return how much of the end of `text` begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def require_name(name: str | None, names: Sequence[str]) -> str:
    """Return the model that a request names; the first if it names none.

    Raises:
        RefusedRequest: there is none of this name.
    """
    if name is None:
        return names[0]
    if name not in names:
        raise RefusedRequest(
            404,
            f"no model {name!r} here; there is: {', '.join(names)}",
            param="model",
            code="model_not_found",
        )
    return name


def list_models(names: Sequence[str], created: int) -> JsonObject:
    """Return the answer of `/v1/models`."""
    return {"object": "list", "data": [describe_model(name, created) for name in names]}


def describe_model(name: str, created: int) -> JsonObject:
    """Return one model as the protocol lists it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "llmtune"}
