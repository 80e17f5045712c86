"""Refuses what a server has no room for: bodies that are too large, before they are read, and too many requests."""

from __future__ import annotations

from fastapi.datastructures import Headers
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from popcompile.serving.errors import ApiError, error_json


class BodyLimit:
    """Middleware: by what a request says of its body's length at once, or else where it gets longer."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        """limit: bytes."""
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said, read = Headers(scope=scope).get("content-length", ""), 0
        if said.isdecimal() and int(said) > self._limit:
            await _refuse(self._refusal(), scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._limit:
                raise self._refusal()
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._limit >> 20} MB; send less", None, "request_too_large")


class RequestLimit:
    """Middleware: of requests that are to be answered, from when they come to the end of their answers."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit, self._count = app, limit, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._count >= self._limit:
            refusal = ApiError(503, f"{self._limit} requests are here already; ask again later", None, "overloaded")
            await _refuse(refusal, scope, receive, send)
            return
        self._count += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._count -= 1


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(error_json(error), error.status_code)(scope, receive, send)
