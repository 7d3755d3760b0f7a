"""Answers on their way from the service's thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Coroutine, Sequence
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from phi4mm_jax.answer import Output, Piece
from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.sampling import SamplingParams
from phi4mm_jax.service import Request, Service
from phi4mm_jax.serving.errors import ApiError
from phi4mm_jax.serving.grammar import Grammar
from phi4mm_jax.serving.metrics import Metrics

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of the model."""

    prompt: Prompt
    """What to answer."""
    params: SamplingParams
    """How."""
    grammar: Grammar | None = None
    """What the answer must follow."""


class Answers:
    """The answers to what is asked together. Closing them ends what is unfinished."""

    def __init__(
        self,
        service: Service,
        metrics: Metrics,
        questions: Sequence[Question],
        *,
        called: float,
        timeout: float,
        streaming: bool,
    ):
        """Asks.

        Args:
          service: answers.
          metrics: are told of every answer.
          questions: what is asked.
          called: when the caller asked, `time.perf_counter` seconds.
          timeout: seconds from `called` on.
          streaming: whether every token is wanted at once.

        Raises:
          RequestError, SamplingError, QueueFullError: see `Service.submit`.
        """
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._requests = [
            Request(
                prompt=question.prompt,
                params=question.params,
                constraint=question.grammar.constraint() if question.grammar else None,
                receive=partial(self._receive, i),
                streaming=streaming,
                timeout=timeout,
                called=called,
            )
            for i, question in enumerate(questions)
        ]
        service.submit(self._requests)
        self._unfinished = set(range(len(self._requests)))
        self._watches = [metrics.watch(question.prompt, called) for question in questions]

    def close(self) -> None:
        """Ends every answer that is still under way."""
        for i in self._unfinished:
            self._service.cancel(self._requests[i])
        self._unfinished = set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces as they come, each with the index of its question; raises what ends an answer early."""
        while self._unfinished:
            i, piece = await self._inbox.get()
            if isinstance(piece, Exception):
                raise piece
            self._watches[i].take(piece)
            if piece.finish_reason:
                self._unfinished.remove(i)
            yield i, piece

    async def outputs(self) -> list[Output]:
        """The whole answers, in the order of the questions."""
        pieces: list[list[Piece]] = [[] for _ in self._requests]
        async for i, piece in self:
            pieces[i].append(piece)
        return [Output.of(parts) for parts in pieces]

    def _receive(self, i: int, piece: Piece | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, (i, piece))


async def while_connected(http_request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work` for as long as the client is there.

    Raises:
      ApiError: the client has gone, and `work` has been cancelled; nobody will read it.
    """
    working, gone = asyncio.create_task(work), asyncio.create_task(_disconnection(http_request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client closed the connection")
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnection(http_request: HttpRequest) -> None:
    while (await http_request.receive())["type"] != "http.disconnect":
        pass
