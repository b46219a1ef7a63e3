"""Requests that are passed on to an engine's own server, which listens on this machine alone."""

import asyncio
import contextlib
import json
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import h11
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from llmtune.io.json_files import parse_json
from llmtune.serving.engine_requests import Follows, PassedOn, read_for_engine
from llmtune.serving.http_api import LOOK_SECONDS, Api, HttpServer, HttpSettings, render_event
from llmtune.serving.listening import ENGINE_HOST
from llmtune.serving.openai_api import BEARER, RefusedRequest

PIECE_BYTES = 1 << 16
OK = 200

Value = TypeVar("Value")


@dataclass(frozen=True)
class Upstream:
    """Where the engine listens, and what it follows."""

    engine: str
    port: int
    key: str
    names: tuple[str, ...]
    follows: Follows


class RelayApi(Api):
    """Passes requests on and answers back."""

    def __init__(self, upstream: Upstream, settings: HttpSettings) -> None:
        super().__init__(upstream.names, settings)
        self._upstream = upstream

    async def answer(self, request: Request, body: Any, *, is_chat: bool) -> Response:
        """Let the engine answer what it follows; who stops listening ends its answer."""
        upstream, settings = self._upstream, self._settings
        asked = read_for_engine(
            body, upstream.follows, upstream.names, settings.temperature, is_chat=is_chat
        )
        parts = _ask(upstream, asked)
        try:
            head = await _unless_gone(anext(parts), request)
            assert isinstance(head, h11.Response), "the head comes first"
            if asked.is_stream and head.status_code == OK:
                return StreamingResponse(
                    _stream(parts, upstream.engine), media_type="text/event-stream"
                )
            whole = await _unless_gone(_join(parts), request)
        except (OSError, h11.ProtocolError) as error:
            raise RefusedRequest(502, f"{upstream.engine} does not answer: {error}") from None
        if head.status_code != OK:
            raise _refusal(head.status_code, whole, upstream.engine)
        return Response(whole, media_type="application/json")


async def _ask(upstream: Upstream, asked: PassedOn) -> AsyncIterator[h11.Response | bytes]:
    """Yield the head of the engine's answer, then its body as it comes."""
    reader, writer = await asyncio.open_connection(ENGINE_HOST, upstream.port)
    body = json.dumps(asked.body).encode()
    headers = [
        ("Host", f"{ENGINE_HOST}:{upstream.port}"),
        ("Authorization", BEARER + upstream.key),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    talk = h11.Connection(h11.CLIENT)
    try:
        request = h11.Request(method="POST", target=asked.path, headers=headers)
        for part in (request, h11.Data(body), h11.EndOfMessage()):
            writer.write(talk.send(part) or b"")
        await writer.drain()
        while True:
            event = talk.next_event()
            if event is h11.NEED_DATA:
                talk.receive_data(await reader.read(PIECE_BYTES))
            elif isinstance(event, h11.Response):
                yield event
            elif isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return
    finally:
        writer.close()


async def _stream(parts: AsyncIterator[h11.Response | bytes], engine: str) -> AsyncIterator[bytes]:
    """Yield events as the engine sends them; a stream that it breaks off has no end mark."""
    try:
        async for part in _only_bytes(parts):
            yield part
    except (OSError, h11.ProtocolError):
        broken = RefusedRequest(503, f"{engine} broke off its answer")
        yield render_event(broken.as_json()).encode()


async def _only_bytes(parts: AsyncIterator[h11.Response | bytes]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(parts):  # type: ignore[type-var]
        async for part in parts:
            assert isinstance(part, bytes)
            yield part


async def _join(parts: AsyncIterator[h11.Response | bytes]) -> bytes:
    return b"".join([part async for part in _only_bytes(parts)])


async def _unless_gone(wanted: Awaitable[Value], request: Request) -> Value:
    """Wait for a value; if the client leaves before it is there, end what makes it."""
    task = asyncio.ensure_future(wanted)
    try:
        while not (await asyncio.wait({task}, timeout=LOOK_SECONDS))[0]:
            if await request.is_disconnected():
                raise ClientDisconnect
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def _refusal(status: int, body: bytes, engine: str) -> RefusedRequest:
    """Return what the engine refuses with, in the protocol's shape."""
    try:
        error = parse_json(body)
        error = error.get("error", error)
        message, param = error["message"], error.get("param")
    except (ValueError, LookupError, TypeError, AttributeError):
        message, param = body.decode("utf-8", "replace")[:500] or "no reason given", None
    told = f"{engine}: {message}"
    return RefusedRequest(status, told, param=param if isinstance(param, str) else None)


class RelayServer(HttpServer):
    """Stops when the engine does, and ends the engine when it is asked to stop itself."""

    def __init__(
        self, upstream: Upstream, settings: HttpSettings, engine: "subprocess.Popen[bytes]"
    ) -> None:
        super().__init__(RelayApi(upstream, settings))
        self._engine = engine
        self.was_asked_to_stop = False

    def break_off(self) -> None:
        """End the engine, and with it what it writes."""
        self.was_asked_to_stop = True
        self._engine.terminate()

    def take_requests(self, taken: socket.socket) -> None:
        """Answer until Ctrl-C or SIGTERM, or until the engine ends."""

        def watch() -> None:
            self._engine.wait()
            self.should_exit = True

        threading.Thread(target=watch, daemon=True).start()
        super().take_requests(taken)
