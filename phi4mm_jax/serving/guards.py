"""What every request must pass before its body is read."""

from __future__ import annotations

import json
import secrets

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phi4mm_jax.serving.errors import ApiError
from phi4mm_jax.serving.metrics import Metrics

_PROTECTED = ("/v1/", "/tokenize", "/detokenize")
_MAX_COMMAS = 250_000
"""Of a body: JSON has one for every further value, of which each takes memory many times its length."""

_CLOSE = {"Connection": "close"}  # or what is left of the body would have to be read
_LATER = {"Retry-After": "1"}


class Guards:
    """Asks for the API key, and keeps bodies within their limits, whether they declare their size or not."""

    def __init__(self, app: ASGIApp, *, api_key: str, max_body_bytes: int, max_held_bytes: int, metrics: Metrics):
        """Wraps an application."""
        self._app, self._key, self._metrics = app, api_key.encode(), metrics
        self._limit, self._limit_held = max_body_bytes, max_held_bytes
        self._held = 0  # bytes of requests that are under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        if not self._may_enter(scope["path"], headers.get("authorization", "")):
            error = ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            return await error_response(error, self._metrics)(scope, receive, send)
        size = f"is larger than {self._limit / 1e6:g} MB"
        if _size(headers.get("content-length", "")) > self._limit:
            return await error_response(_too_large(size), self._metrics)(scope, receive, send)
        is_form = headers.get("content-type", "").startswith("multipart/")
        received = commas = 0

        async def receive_within_limits() -> Message:
            nonlocal received, commas
            message = await receive()
            body = message.get("body", b"")
            received, self._held = received + len(body), self._held + len(body)
            commas += 0 if is_form else body.count(b",")
            if received > self._limit:
                raise _too_large(size)
            if commas > _MAX_COMMAS:
                raise _too_large(f"holds more than {_MAX_COMMAS} commas")
            if self._held > self._limit_held:
                raise ApiError(429, "too much is being sent; try again later", code="busy", headers=_CLOSE | _LATER)
            return message

        try:
            await self._app(scope, receive_within_limits, send)
        finally:
            self._held -= received

    def _may_enter(self, path: str, authorization: str) -> bool:
        if not self._key or not path.startswith(_PROTECTED):
            return True
        scheme, _, key = authorization.partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(key.strip().encode(), self._key)


def _too_large(problem: str) -> ApiError:
    return ApiError(413, f"the request {problem}", code="too_large", headers=_CLOSE)


def _size(declared: str) -> int:
    """What a Content-Length says; one that is none is refused elsewhere."""
    return int(declared) if declared.isdecimal() and len(declared) < 20 else 0


def error_response(error: ApiError, metrics: Metrics) -> Response:
    """The answer that tells an error, which is counted."""
    metrics.count_error(error)
    body = json.dumps(error.body)  # ASCII: what is quoted of a request need not be valid Unicode
    return Response(body, error.status_code, error.headers, media_type="application/json")
