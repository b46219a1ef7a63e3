"""The loaded models behind an OpenAI-compatible endpoint: one request at a time, in order."""

import asyncio
import contextlib
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmtune.errors import LlmtuneError
from llmtune.evaluation.endpoint import LOOPBACK
from llmtune.io.fingerprint import JsonObject
from llmtune.io.json_files import parse_json
from llmtune.scoring.generate import Piece
from llmtune.serving.listening import MAX_WAITING
from llmtune.serving.live_models import LiveModels
from llmtune.serving.openai_api import (
    BEARER,
    AnswerRequest,
    RefusedRequest,
    Shape,
    describe_model,
    finish_reason,
    list_models,
    read_chat,
    read_completion,
)

log = logging.getLogger("llmtune")

MOST_BYTES = 16 << 20
LOOK_SECONDS = 0.5
"""How often it is looked whether a client that waits is still there."""
GOODBYE_SECONDS = 5


@dataclass(frozen=True)
class HttpSettings:
    """How requests are taken."""

    host: str
    api_key: str | None = None
    temperature: float = 1.0
    """Of a request that names none."""
    max_waiting: int = MAX_WAITING
    """Requests that may wait for the one that is answered; more are refused."""


class Worker:
    """The one thread that computes; what is given to it waits in order."""

    def __init__(self, models: LiveModels, max_waiting: int) -> None:
        self.models = models
        self.stopping = threading.Event()
        self._max_waiting = max_waiting
        self._pool = ThreadPoolExecutor(1, "llmtune-serve")
        self._unfinished = 0

    async def answer(
        self, request: AnswerRequest, is_gone: Callable[[], Awaitable[bool]]
    ) -> AsyncIterator[int | Piece]:
        """Yield what `LiveModels.answer` does; who stops listening stops the generation.

        Raises:
            RefusedRequest: too many wait, or the request does not fit the model.
            ClientDisconnect: `is_gone` while it waits or before it is written.
        """
        if self._unfinished > self._max_waiting:
            raise RefusedRequest(
                503, f"{self._max_waiting} requests are waiting already; try later", code="busy"
            )
        loop = asyncio.get_running_loop()
        parts: asyncio.Queue[int | Piece | BaseException | None] = asyncio.Queue()
        is_left = threading.Event()
        self._unfinished += 1

        def tell(part: int | Piece | BaseException | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(parts.put_nowait, part)

        def is_cancelled() -> bool:
            return is_left.is_set() or self.stopping.is_set()

        def compute() -> None:
            try:
                if not is_cancelled():
                    for part in self.models.answer(request, is_cancelled):
                        tell(part)
            except BaseException as error:  # noqa: BLE001 (raised where the answer is awaited)
                tell(error)
            tell(None)

        computing = loop.run_in_executor(self._pool, compute)
        computing.add_done_callback(lambda _: self._finish())
        try:
            while True:
                part = await _next(parts, is_gone)
                if part is None:
                    return
                if isinstance(part, BaseException):
                    raise part
                yield part
        finally:
            is_left.set()

    def _finish(self) -> None:
        self._unfinished -= 1

    def close(self) -> None:
        """End what is computed."""
        self.stopping.set()
        self._pool.shutdown(cancel_futures=True)


async def _next(
    parts: "asyncio.Queue[int | Piece | BaseException | None]",
    is_gone: Callable[[], Awaitable[bool]],
) -> int | Piece | BaseException | None:
    while True:
        try:
            return await asyncio.wait_for(parts.get(), LOOK_SECONDS)
        except TimeoutError:
            if await is_gone():
                raise ClientDisconnect from None


class Api:
    """The routes."""

    def __init__(self, worker: Worker, settings: HttpSettings) -> None:
        self._worker = worker
        self._settings = settings
        self._created = int(time.time())

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]
        # A page in a browser must not reach a server of this machine under a name of its own.
        hosts = [*LOOPBACK, "[::1]"] if self._settings.host in LOOPBACK else ["*"]
        return Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers={
                RefusedRequest: _refuse,
                HTTPException: _refuse_route,
                LlmtuneError: _fail,
                ClientDisconnect: _leave,
            },
        )

    async def health(self, _: Request) -> Response:
        """Say that requests are taken."""
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """List the models' names."""
        self._admit(request)
        return JSONResponse(list_models(self._worker.models.names, self._created))

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        self._admit(request)
        found = self._worker.models.find(request.path_params["name"])
        return JSONResponse(describe_model(found.name, self._created))

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        self._admit(request)
        asked = read_chat(await _read_body(request), self._settings.temperature)
        return await self._answer(request, asked)

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        self._admit(request)
        asked = read_completion(await _read_body(request), self._settings.temperature)
        return await self._answer(request, asked)

    def _admit(self, request: Request) -> None:
        key = self._settings.api_key
        if key is None:
            return
        given = request.headers.get("authorization", "")
        expected = BEARER + key
        if not hmac.compare_digest(given.encode(), expected.encode()):
            raise RefusedRequest(
                401, "wrong or missing API key (Authorization: Bearer KEY)", code="invalid_api_key"
            )

    async def _answer(self, request: Request, asked: AnswerRequest) -> Response:
        name = self._worker.models.find(asked.model).name
        started = time.monotonic()
        parts = self._worker.answer(asked, request.is_disconnected)
        try:
            length = await anext(parts)
        except StopAsyncIteration:
            raise RefusedRequest(503, "the server is being stopped") from None
        assert isinstance(length, int), "the prompt's length comes first"
        shape = Shape(name, asked.is_chat, length)
        if asked.stream:
            events = _stream(parts, shape, asked.with_usage, started)
            return StreamingResponse(events, media_type="text/event-stream")
        text, last = "", Piece("", 0)
        async with contextlib.aclosing(parts):  # type: ignore[type-var]
            async for part in parts:
                assert isinstance(part, Piece)
                text, last = text + part.text, part
        if not last.is_last:
            raise RefusedRequest(503, "the server is being stopped")
        _log_answer(shape, last, started)
        return JSONResponse(shape.whole(text, finish_reason(last.stopped), last.num_tokens))


async def _stream(
    parts: AsyncIterator[int | Piece], shape: Shape, with_usage: bool, started: float
) -> AsyncIterator[str]:
    """Yield the answer as server-sent events; an answer that is broken off has no end mark."""
    last = Piece("", 0)
    async with contextlib.aclosing(parts):  # type: ignore[type-var]
        if shape.is_chat:
            yield _event(shape.chunk("", is_first=True))
        try:
            async for part in parts:
                assert isinstance(part, Piece)
                last = part
                if part.text:
                    yield _event(shape.chunk(part.text))
        except (RefusedRequest, LlmtuneError) as error:
            told = error if isinstance(error, RefusedRequest) else RefusedRequest(500, str(error))
            log.error("serve: %s", error)
            yield _event(told.as_json())
            return
    if not last.is_last:
        yield _event(RefusedRequest(503, "the server is being stopped").as_json())
        return
    yield _event(shape.chunk("", finish_reason(last.stopped)))
    if with_usage:
        yield _event(shape.usage_chunk(last.num_tokens))
    yield "data: [DONE]\n\n"
    _log_answer(shape, last, started)


def _event(content: JsonObject) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _log_answer(shape: Shape, last: Piece, started: float) -> None:
    log.info(
        "serve: %s read %d tokens and wrote %d in %.1f s",
        shape.model,
        shape.prompt_tokens,
        last.num_tokens,
        time.monotonic() - started,
    )


async def _read_body(request: Request) -> Any:
    """Return the JSON of a request.

    A page of a different site may send text without asking first, but not this type.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedRequest(415, "expected the header Content-Type: application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise RefusedRequest(413, f"the body has more than {MOST_BYTES >> 20} MiB")
    try:
        return parse_json(bytes(body))
    except ValueError as error:
        raise RefusedRequest(400, f"the body is not JSON: {error}") from None


def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedRequest)
    headers = {"Retry-After": "5"} if error.status == 503 else None
    return JSONResponse(error.as_json(), error.status, headers)


def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(RefusedRequest(error.status_code, what).as_json(), error.status_code)


def _fail(_: Request, error: Exception) -> Response:
    log.error("serve: %s", error)
    return JSONResponse(RefusedRequest(500, str(error)).as_json(), 500)


def _leave(_: Request, error: Exception) -> Response:
    return Response(status_code=499)


class Server(uvicorn.Server):
    """Ends what is being written when it is asked to stop."""

    def __init__(self, models: LiveModels, settings: HttpSettings) -> None:
        self.worker = Worker(models, settings.max_waiting)
        config = uvicorn.Config(
            Api(self.worker, settings).app(),
            # Its own config of logging would close the handlers of everyone in this process.
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=GOODBYE_SECONDS,
            server_header=False,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Break off the answer that is being written, and stop."""
        self.worker.stopping.set()
        super().handle_exit(sig, frame)

    def take_requests(self, taken: socket.socket) -> None:
        """Answer until Ctrl-C or SIGTERM, which end it without an error."""
        try:
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises its signal once more
                self.run(sockets=[taken])
        finally:
            self.worker.close()
            taken.close()
