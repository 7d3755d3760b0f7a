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


class Guards:
    """Asks for the API key, and keeps bodies within their limit, whether they declare their size or not."""

    def __init__(self, app: ASGIApp, *, api_key: str, max_body_bytes: int, metrics: Metrics):
        """Wraps an application."""
        self._app, self._key, self._limit, self._metrics = app, api_key.encode(), max_body_bytes, metrics

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
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            return await error_response(self._too_large(), self._metrics)(scope, receive, send)
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._too_large()
            return message

        await self._app(scope, receive_within_limit, send)

    def _may_enter(self, path: str, authorization: str) -> bool:
        if not self._key or not path.startswith(_PROTECTED):
            return True
        scheme, _, key = authorization.partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(key.strip().encode(), self._key)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the request is larger than {self._limit / 1e6:g} MB",
            code="too_large",
            headers={"Connection": "close"},
        )


def error_response(error: ApiError, metrics: Metrics) -> Response:
    """The answer that tells an error, which is counted."""
    metrics.count_error(error)
    body = json.dumps(error.body)  # ASCII: what is quoted of a request need not be valid Unicode
    return Response(body, error.status_code, error.headers, media_type="application/json")
