"""The loaded models behind an OpenAI-compatible endpoint: one request at a time, in order."""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from llmtune.errors import LlmtuneError
from llmtune.serving.http_api import LOOK_SECONDS, Api, HttpServer, HttpSettings, render_event
from llmtune.serving.listening import MAX_WAITING
from llmtune.serving.live_models import LiveModels
from llmtune.serving.openai_api import (
    AnswerRequest,
    RefusedRequest,
    read_chat,
    read_completion,
)
from llmtune.serving.shapes import Said, Shape, Whole

log = logging.getLogger("llmtune")


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
    ) -> AsyncIterator[int | Said]:
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
        parts: asyncio.Queue[int | Said | BaseException | None] = asyncio.Queue()
        is_left = threading.Event()
        self._unfinished += 1

        def tell(part: int | Said | BaseException | None) -> None:
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
    parts: "asyncio.Queue[int | Said | BaseException | None]",
    is_gone: Callable[[], Awaitable[bool]],
) -> int | Said | BaseException | None:
    while True:
        try:
            return await asyncio.wait_for(parts.get(), LOOK_SECONDS)
        except TimeoutError:
            if await is_gone():
                raise ClientDisconnect from None


class LiveApi(Api):
    """Answers of the loaded models."""

    def __init__(self, worker: Worker, settings: HttpSettings) -> None:
        super().__init__(worker.models.names, settings)
        self._worker = worker

    async def answer(self, request: Request, body: Any, *, is_chat: bool) -> Response:
        """Answer with a loaded model."""
        read = read_chat if is_chat else read_completion
        asked = read(body, self._settings.temperature)
        name = self._worker.models.find(asked.model).name
        started = time.monotonic()
        parts = self._worker.answer(asked, request.is_disconnected)
        try:
            length = await anext(parts)
        except StopAsyncIteration:
            raise RefusedRequest(503, "the server is being stopped") from None
        assert isinstance(length, int), "the prompt's length comes first"
        shape = Shape(name, asked.is_chat, length, asked.num_likeliest is not None)
        if asked.stream:
            events = _stream(parts, shape, asked, started)
            return StreamingResponse(events, media_type="text/event-stream")
        answers = {place: Whole() for place in range(asked.num_answers)}
        async with contextlib.aclosing(parts):  # type: ignore[type-var]
            async for part in parts:
                assert isinstance(part, Said)
                answers[part.place].add(part)
        if not all(answer.finish for answer in answers.values()):
            raise RefusedRequest(503, "the server is being stopped")
        _log_answer(shape, sum(answer.num_tokens for answer in answers.values()), started)
        return JSONResponse(shape.whole(answers))


async def _stream(
    parts: AsyncIterator[int | Said], shape: Shape, asked: AnswerRequest, started: float
) -> AsyncIterator[str]:
    """Yield the answers as server-sent events; one that is broken off has no end mark."""
    lasts = {place: Said("", place=place) for place in range(asked.num_answers)}
    async with contextlib.aclosing(parts):  # type: ignore[type-var]
        if shape.is_chat:
            for each in lasts.values():
                yield render_event(shape.chunk(each, is_first=True))
        try:
            async for part in parts:
                assert isinstance(part, Said)
                lasts[part.place] = part
                if part.text or part.tokens or part.calls:
                    yield render_event(shape.chunk(replace(part, finish=None)))
                if part.finish:
                    end = Said("", place=part.place, finish=part.finish)
                    yield render_event(shape.chunk(end))
        except (RefusedRequest, LlmtuneError) as error:
            told = error if isinstance(error, RefusedRequest) else RefusedRequest(500, str(error))
            log.error("serve: %s", error)
            yield render_event(told.as_json())
            return
    if not all(last.finish for last in lasts.values()):
        yield render_event(RefusedRequest(503, "the server is being stopped").as_json())
        return
    num_tokens = sum(last.num_tokens for last in lasts.values())
    if asked.with_usage:
        yield render_event(shape.usage_chunk(num_tokens))
    yield "data: [DONE]\n\n"
    _log_answer(shape, num_tokens, started)


def _log_answer(shape: Shape, num_tokens: int, started: float) -> None:
    log.info(
        "serve: %s read %d tokens and wrote %d in %.1f s",
        shape.model,
        shape.prompt_tokens,
        num_tokens,
        time.monotonic() - started,
    )


class Server(HttpServer):
    """Ends what is being written when it is asked to stop."""

    def __init__(
        self, models: LiveModels, settings: HttpSettings, max_waiting: int = MAX_WAITING
    ) -> None:
        """Serve `models`; `max_waiting` requests may wait for the one that is answered."""
        self.worker = Worker(models, max_waiting)
        super().__init__(LiveApi(self.worker, settings))

    def break_off(self) -> None:
        """Stop the answer that is being written."""
        self.worker.stopping.set()

    def take_requests(self, taken: socket.socket) -> None:
        """Answer until Ctrl-C or SIGTERM, which end it without an error."""
        try:
            super().take_requests(taken)
        finally:
            self.worker.close()
