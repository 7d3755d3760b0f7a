"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from phi4mm_jax.serving.errors import as_api_error
from phi4mm_jax.serving.metrics import Metrics


class Closable(Protocol):
    """What has to be ended when the client has gone."""

    def close(self) -> None: ...


class EventStream(StreamingResponse):
    """Sends JSON objects as server-sent events, and `[DONE]` after the last; an error is an event, too."""

    def __init__(self, events: AsyncIterator[dict[str, Any]], source: Closable, metrics: Metrics):
        """Wraps the events.

        Args:
          events: to send.
          source: what they come from; it is closed however the response ends.
          metrics: hear of errors.
        """
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies shall not collect events
        super().__init__(self._lines(events), media_type="text/event-stream", headers=headers)
        self._source, self._metrics = source, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._source.close()

    async def _lines(self, events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
        try:
            async for event in events:
                yield _line(event)
            yield "data: [DONE]\n\n"
        except Exception as error:
            told = as_api_error(error)
            self._metrics.count_error(told)
            yield _line(told.body)


def _line(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
