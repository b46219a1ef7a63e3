"""What every endpoint here shares: who may ask, the models' names, errors, and a server to stop."""

import contextlib
import hmac
import json
import logging
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llmtune.errors import LlmtuneError
from llmtune.evaluation.endpoint import LOOPBACK
from llmtune.io.fingerprint import JsonObject
from llmtune.io.json_files import parse_json
from llmtune.serving.openai_api import (
    BEARER,
    RefusedRequest,
    describe_model,
    list_models,
    require_name,
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


class Api(ABC):
    """The routes, for whoever computes the answers."""

    def __init__(self, names: Sequence[str], settings: HttpSettings) -> None:
        self._names = names
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
        return JSONResponse(list_models(self._names, self._created))

    async def model(self, request: Request) -> Response:
        """Describe one model."""
        self._admit(request)
        name = require_name(request.path_params["name"], self._names)
        return JSONResponse(describe_model(name, self._created))

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        self._admit(request)
        return await self.answer(request, await _read_body(request), is_chat=True)

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        self._admit(request)
        return await self.answer(request, await _read_body(request), is_chat=False)

    @abstractmethod
    async def answer(self, request: Request, body: Any, *, is_chat: bool) -> Response:
        """Answer a request whose sender may ask."""

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


def render_event(content: JsonObject) -> str:
    """Return one server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


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


class HttpServer(uvicorn.Server):
    """Takes requests until it is asked to stop."""

    def __init__(self, api: Api) -> None:
        config = uvicorn.Config(
            api.app(),
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
        """Break off what is being answered, and stop."""
        self.break_off()
        super().handle_exit(sig, frame)

    def break_off(self) -> None:
        """End what is computed; nothing by itself."""

    def take_requests(self, taken: socket.socket) -> None:
        """Answer until Ctrl-C or SIGTERM, which end it without an error."""
        try:
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises its signal once more
                self.run(sockets=[taken])
        finally:
            taken.close()
