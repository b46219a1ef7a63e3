"""An endpoint that speaks the OpenAI protocol: its settings, its client, and what replies cost.

The key is read from an environment variable when a request is made; it is in no file, message or
log.
"""

import contextlib
import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import Field

from llmtune.errors import LlmtuneError
from llmtune.io.fingerprint import hash_json
from llmtune.io.json_files import parse_json
from llmtune.schema import Section

log = logging.getLogger("llmtune")

Name = TypeVar("Name")

LOOPBACK = ("localhost", "127.0.0.1", "::1")
TRIES = 4
RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})
REFUSED = frozenset({400, 413, 422})
"""What a question is refused with that would be refused again."""
LONGEST_WAIT = 60.0
MOST_BYTES = 8 << 20
SHOWN_CHARACTERS = 200


class EndpointConfig(Section):
    """A model behind an OpenAI-compatible endpoint, asked the same items."""

    url: str
    """Where it answers, up to the version: `https://HOST/v1`."""
    model: str
    """The model's name there."""
    key_env: str | None = None
    """The environment variable that holds the key; the key itself is never written anywhere."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer in tokens; null takes the suite's own length."""
    input_price: float | None = Field(default=None, ge=0)
    """Price of a million tokens that are read, in your currency."""
    output_price: float | None = Field(default=None, ge=0)
    """Price of a million tokens that are written."""
    extra: dict[str, Any] = Field(default={})
    """More keys of the request, such as `{reasoning_effort: low}`; null takes one of ours out."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """How long one answer may take."""
    parallel_requests: int = Field(default=4, ge=1, le=64)
    """Requests at a time."""


@dataclass(frozen=True)
class Reply:
    """One answer, with the tokens that the endpoint counted; None if it counts none."""

    text: str
    input_tokens: int | None
    output_tokens: int | None
    seconds: float
    stopped: bool | None = None
    """Whether the answer ended by itself; None if that is not said."""


@dataclass(frozen=True)
class RequestCost:
    """What the requests to an endpoint took: tokens and seconds each, and the price of 1,000.

    None if the endpoint counts no tokens, or the config names no prices.
    """

    endpoint: str
    model: str
    input_tokens: float | None
    output_tokens: float | None
    seconds_per_request: float
    price_per_1000: float | None


def describe_cost(config: EndpointConfig, replies: Sequence[Reply]) -> RequestCost:
    """Return what the requests took."""
    read = _mean([reply.input_tokens for reply in replies])
    written = _mean([reply.output_tokens for reply in replies])
    price = None
    paid = ((read, config.input_price), (written, config.output_price))
    parts = [count * cost for count, cost in paid if count is not None and cost is not None]
    if len(parts) == len(paid):
        price = sum(parts) / 1000
    return RequestCost(
        endpoint=config.url,
        model=config.model,
        input_tokens=read,
        output_tokens=written,
        seconds_per_request=sum(reply.seconds for reply in replies) / len(replies),
        price_per_1000=price,
    )


def _mean(counts: Sequence[int | None]) -> float | None:
    known = [count for count in counts if count is not None]
    return sum(known) / len(known) if len(known) == len(counts) else None


class RefusedQuestion(LlmtuneError):
    """The endpoint answers that it will not answer this question; a different one it may."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key along."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Endpoint:
    """One endpoint, checked; it is asked when `ask` is called."""

    def __init__(
        self, where: str, config: EndpointConfig, *, names: tuple[str, str] | None = None
    ) -> None:
        """Check the settings of an endpoint.

        Args:
            where: its place in the config, or the option that names it.
            names: what sets its address and its key; None: the keys of a config.
        """
        self.where = where
        self.config = config
        url_name, self._key_name = names or (f"{where}.url", f"{where}.key_env")
        self._has_answered = False
        self._is_given_up = threading.Event()
        parts = urlsplit(config.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise LlmtuneError(
                f"{url_name}: {config.url!r}: expected http(s)://HOST/v1, without a user"
            )
        if config.key_env is not None:
            if not os.environ.get(config.key_env):
                raise LlmtuneError(
                    f"{self._key_name}: the environment variable {config.key_env} is not set; "
                    "it must hold the key"
                )
            if parts.scheme == "http" and parts.hostname not in LOOPBACK:
                raise LlmtuneError(
                    f"{url_name}: {config.url}: a key would be sent unencrypted; use https"
                )
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Reply:
        """Return the likeliest answer to a chat (temperature 0).

        Raises:
            LlmtuneError: it cannot be reached, refuses, or answers something else.
        """
        body = {
            "model": self.config.model,
            "messages": [_as_openai(message) for message in messages],
            "tools": tools,
            "temperature": 0,
            "max_tokens": self.config.max_tokens or max_tokens,
            **self.config.extra,
        }
        if "max_completion_tokens" in body:
            del body["max_tokens"]
        content = json.dumps({k: v for k, v in body.items() if v is not None}).encode()
        started = time.perf_counter()
        answer = self._post(content)
        return self._read(answer, time.perf_counter() - started)

    def _post(self, content: bytes) -> Any:
        url = f"{self.config.url.rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.config.key_env) if self.config.key_env else None
        if key:
            headers["Authorization"] = f"Bearer {key}"
        for number in range(1, TRIES + 1):
            request = urllib.request.Request(url, content, headers)
            wait = 2.0 ** (number - 1)
            try:
                status, retry_after, answer = self._send(request)
                if status is None:
                    found = parse_json(answer.decode("utf-8"))
                    self._has_answered = True
                    return found
                text = _hide(_reason(answer.decode("utf-8", "replace")), key)
                problem = f"{status} {text[:SHOWN_CHARACTERS]}"
                if status in REFUSED:
                    raise RefusedQuestion(f"{self.where}: {url}", problem)
                if status not in RETRIED:
                    raise LlmtuneError(f"{self.where}: {url}: {problem}{self._hint(status)}")
                wait = _wait_of(retry_after, wait)
            except (OSError, http.client.HTTPException) as error:
                problem = f"no answer ({_hide(str(error), key)})"
                if _is_closed(error) and not self._has_answered:
                    raise LlmtuneError(
                        f"{self.where}: {url}: nothing listens there (connection refused); start "
                        "the server, or correct the address"
                    ) from None
            except ValueError as error:
                raise LlmtuneError(f"{self.where}: {url}: not JSON ({error})") from None
            if number < TRIES:
                log.info("%s: %s; once more in %.0f s", self.where, problem, wait)
                if self._is_given_up.wait(wait):
                    break
        raise LlmtuneError(
            f"{self.where}: {url}: {problem}; answers so far are kept, the same command continues"
        )

    def _send(self, request: urllib.request.Request) -> tuple[int | None, str | None, bytes]:
        """Return the status of an error (None: it is none), when to ask again, and the body."""
        try:
            with self._opener.open(request, timeout=self.config.timeout_seconds) as answer:
                return None, None, answer.read(MOST_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers.get("Retry-After"), error.read(MOST_BYTES)

    def give_up(self) -> None:
        """Wait for nothing any more: whoever asked has failed or was stopped."""
        self._is_given_up.set()

    def _hint(self, status: int) -> str:
        """Return what to do about an answer that every question would get."""
        if status in (401, 403):
            refuses, asks = ("refuses", "asks") if status == 401 else ("may refuse", "may ask")
            if self.config.key_env:
                return f"; it {refuses} the key in ${self.config.key_env}"
            return f"; it {asks} for a key, and {self._key_name} is not given"
        is_short = not urlsplit(self.config.url).path.strip("/")
        return "; an address usually ends in /v1" if status == 404 and is_short else ""

    def _read(self, answer: Any, seconds: float) -> Reply:
        try:
            text = _text_of(answer["choices"][0]["message"])
            usage = answer.get("usage") or {}
        except (KeyError, IndexError, TypeError, AttributeError):
            text, usage = None, {}
        if not isinstance(text, str):
            raise LlmtuneError(f"{self.where}: {self.config.url}: answered without a message")
        reason = answer["choices"][0].get("finish_reason")
        read, written = (usage.get(key) for key in ("prompt_tokens", "completion_tokens"))
        return Reply(
            text,
            read if isinstance(read, int) else None,
            written if isinstance(written, int) else None,
            seconds,
            {"stop": True, "tool_calls": True, "length": False}.get(reason),
        )


@dataclass(frozen=True)
class Question:
    """One request: a chat, the longest answer in tokens, and schemas of tools."""

    messages: Sequence[Mapping[str, Any]]
    max_tokens: int
    tools: Sequence[Mapping[str, Any]] = ()

    def key(self, config: EndpointConfig) -> str:
        """Return a hash of all that decides an answer; prices and patience do not."""
        asked = config.model_dump(mode="json", include={"url", "model", "max_tokens", "extra"})
        tools = [self.tools] if self.tools else []  # older answers are of items without any
        return hash_json([asked, self.messages, self.max_tokens, *tools])


def ask_all(
    endpoint: Endpoint,
    questions: Mapping[str, Question],
    path: Path,
    *,
    what: str,
    is_new: bool = False,
) -> dict[str, Reply]:
    """Return the reply to every question by its name; those kept in `path` are not asked again.

    Args:
        path: a JSONL file that takes each reply as it comes.
        what: what the questions are of, for the log.
        is_new: whether all are asked again.

    Raises:
        LlmtuneError: the endpoint fails or refuses a question; the replies so far are kept.
    """
    known = {} if is_new else dict(_read_kept(path))
    keys = {name: question.key(endpoint.config) for name, question in questions.items()}
    left = {key: questions[name] for name, key in keys.items() if key not in known}
    if left:
        log.info("evaluate: %s is asked %d items of %s", endpoint.where, len(left), what)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8") as file,
        closing(iter_replies(endpoint, left, is_ended_by_refusal=True)) as replies,
    ):
        if _is_cut_off(path):
            file.write("\n")
        refusals = []
        for key, reply in replies:
            if isinstance(reply, RefusedQuestion):
                refusals.append(reply)
                continue
            known[key] = reply
            file.write(json.dumps({"question": key, **asdict(reply)}) + "\n")
            file.flush()
        if refusals:
            raise LlmtuneError(f"{refusals[0]}; answers so far are kept")
    return {name: known[key] for name, key in keys.items()}


def iter_replies(
    endpoint: Endpoint, questions: Mapping[Name, Question], *, is_ended_by_refusal: bool = False
) -> Generator[tuple[Name, Reply | RefusedQuestion]]:
    """Yield the name of each question with its reply, as they come; several are asked at a time.

    A question that is refused comes with the refusal.

    Args:
        is_ended_by_refusal: whether nothing more is asked once a question is refused.

    Raises:
        LlmtuneError: the endpoint fails; questions that it was not asked yet are dropped, and
            replies that came before are yielded first.
    """

    def ask(question: Question) -> Reply | RefusedQuestion:
        try:
            return endpoint.ask(question.messages, question.max_tokens, question.tools or None)
        except RefusedQuestion as refusal:
            return refusal

    pool = ThreadPoolExecutor(endpoint.config.parallel_requests)
    is_done = False
    try:
        left = {pool.submit(ask, each): name for name, each in questions.items()}
        for done in as_completed(tuple(left)):
            name = left.pop(done)
            is_last = done.exception() is not None or (
                is_ended_by_refusal and isinstance(done.result(), RefusedQuestion)
            )
            if is_last:
                endpoint.give_up()
                pool.shutdown(cancel_futures=True)
                for other, other_name in left.items():
                    if not other.cancelled() and other.exception() is None:
                        yield other_name, other.result()
            yield name, done.result()
            if is_last:
                break
        is_done = True
    finally:
        if not is_done:
            endpoint.give_up()
        pool.shutdown(cancel_futures=True)


def _text_of(message: Mapping[str, Any]) -> Any:
    """Return what a message says; calls of tools follow as JSON text, without their random ids."""
    calls = message.get("tool_calls")
    if not calls:
        return message["content"] or ""
    sent = [{key: value for key, value in call.items() if key != "id"} for call in calls]
    text = json.dumps(sent, ensure_ascii=False)
    return "\n".join(part for part in (message.get("content"), text) if part)


def _as_openai(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its calls as the text that this protocol has."""
    calls = [
        {
            "type": "function",
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message.get("tool_calls") or ()
    ]
    return {**message, **({"tool_calls": calls} if calls else {})}


def _read_kept(path: Path) -> Iterator[tuple[str, Reply]]:
    """Yield what is kept; a last line that was cut off is passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # nothing was asked yet
    for line in lines:
        try:
            values = parse_json(line)
            yield str(values.pop("question")), Reply(**values)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # cut off by a stop: it is asked again


def _is_cut_off(path: Path) -> bool:
    """Whether a stop left a last line without its end."""
    content = path.read_bytes()
    return bool(content) and not content.endswith(b"\n")


def _is_closed(error: Exception) -> bool:
    """Whether nothing listens at the address."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return isinstance(reason, ConnectionRefusedError)


def _reason(text: str) -> str:
    """Return what an answer says of its error, on one line: its message if it has one."""
    message: Any = None
    with contextlib.suppress(ValueError, AttributeError):
        found = parse_json(text).get("error")
        message = found.get("message") if isinstance(found, Mapping) else found
    return " ".join((message if isinstance(message, str) else text).split())


def _hide(text: str, key: str | None) -> str:
    return text.replace(key, "***") if key else text


def _wait_of(header: str | None, usual: float) -> float:
    try:
        return min(LONGEST_WAIT, max(0.0, float(header))) if header else usual
    except ValueError:
        return usual
