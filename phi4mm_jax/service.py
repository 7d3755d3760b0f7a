"""Requests of any number of threads on one engine, which a thread drives for as long as there is work."""

from __future__ import annotations

import dataclasses
import heapq
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from phi4mm_jax.answer import Answer, Output, Piece
from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.runtime.buckets import round_up
from phi4mm_jax.runtime.counts import Counts
from phi4mm_jax.runtime.engine import Engine
from phi4mm_jax.runtime.limits import answer_limit, cache_length
from phi4mm_jax.runtime.memory import MemoryPlan, MemoryPlanError, available_memory, plan_memory
from phi4mm_jax.runtime.rows import Constraint
from phi4mm_jax.runtime.sampling import SamplingParams
from phi4mm_jax.runtime.steps import Steps, Weights

logger = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """More requests wait than the service allows; the message says how many."""


class RequestTimeoutError(RuntimeError):
    """A request was not finished within its time."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One prompt to answer. Its identity is the object's."""

    prompt: Prompt
    """What to answer."""
    params: SamplingParams
    """How."""
    constraint: Constraint | None = None
    """What its tokens must be like."""
    receive: Callable[[Piece | Exception], None] = lambda _: None
    """Is given every piece of the answer, or the error that ends it, by the service's thread; it must return soon. If
    it fails, nobody listens any more, and the request ends."""
    streaming: bool = False
    """Whether every token is wanted at once, at the price of throughput."""
    timeout: float | None = None
    """Seconds from the call until it is given up with a RequestTimeoutError."""
    called: float = dataclasses.field(default_factory=time.perf_counter)
    """When the caller asked, `time.perf_counter` seconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What a service is doing at this moment."""

    running: int
    """Requests that have a row of the cache."""
    waiting: int
    """Requests that have none yet."""
    rows: int
    """Rows of the cache; 0 before the first request."""
    length: int
    """Positions of each."""
    used: int
    """Positions that running requests fill."""
    counts: Counts
    """What it has done so far."""


class Service:
    """Answers requests. Every method may be called by any thread."""

    def __init__(
        self,
        steps: Steps,
        weights: Weights,
        tokenizer: Tokenizer,
        *,
        shape: tuple[int, int] = (1, 1),
        max_waiting: int | None = None,
        report: Callable[[MemoryPlan], None] | None = None,
    ):
        """Begins with nothing to do; memory is taken when the first request comes.

        Args:
          steps: programs of the model.
          weights: what they run on.
          tokenizer: of the model.
          shape: rows and positions that the cache has at least, even if the requests at hand need less.
          max_waiting: most requests that may wait for a row; None for any number.
          report: is told the plan of every new cache.
        """
        self._steps, self._weights, self._tokenizer = steps, weights, tokenizer
        self._shape, self._max_waiting, self._report = shape, max_waiting, report
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._inbox: list[Request] = []
        self._cancelled: list[Request] = []
        self._counts = Counts()
        # The thread's own.
        self._engine: Engine | None = None
        self._backlog: deque[Request] = deque()  # what the engine has no room for
        self._answers: dict[int, tuple[Request, Answer]] = {}  # by the engine's id

    # --- any thread ------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues requests; those of one call begin together as far as there is room.

        Raises:
          RequestError, SamplingError: one does not fit the context; none is queued.
          QueueFullError: so many may not wait; none is queued.
        """
        for request in requests:
            answer_limit(self._steps, request.prompt, request.params)
        with self._lock:
            waiting = self.load().waiting
            if self._max_waiting is not None and waiting + len(requests) > self._max_waiting:
                raise QueueFullError(f"{waiting} requests are waiting and {self._max_waiting} may; try again later")
            self._inbox += requests
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="phi4mm-service", daemon=True)
                self._thread.start()

    def pieces(self, requests: Sequence[Request]) -> Iterator[tuple[int, Piece]]:
        """Submits requests when it is advanced, and yields the pieces of all answers, each with its request's index.

        The iterator takes the place of `receive`. Closing it early cancels what is unfinished.

        Raises:
          Exception: whatever `submit` raises, or ends one of the requests.
        """
        inbox: queue.SimpleQueue[tuple[int, Piece | Exception]] = queue.SimpleQueue()
        own = [
            dataclasses.replace(request, receive=lambda said, i=i: inbox.put((i, said)))
            for i, request in enumerate(requests)
        ]
        self.submit(own)
        unfinished = set(own)
        try:
            while unfinished:
                i, piece = inbox.get()
                if isinstance(piece, Exception):
                    raise piece
                if piece.finish_reason:
                    unfinished.remove(own[i])
                yield i, piece
        finally:
            for request in unfinished:
                self.cancel(request)

    def outputs(self, requests: Sequence[Request]) -> list[Output]:
        """Submits requests and waits for their whole answers. Errors are those of `pieces`."""
        parts: list[list[Piece]] = [[] for _ in requests]
        for i, piece in self.pieces(requests):
            parts[i].append(piece)
        return [Output.of(pieces) for pieces in parts]

    def cancel(self, request: Request) -> None:
        """Ends a request without another word; one that has ended is left alone."""
        with self._lock:
            if self._thread:  # without it, all have ended
                self._cancelled.append(request)

    def load(self) -> Load:
        """What it is doing, by counts that may be a moment old."""
        engine = self._engine
        return Load(
            running=engine.running if engine else 0,
            waiting=len(self._inbox) + len(self._backlog) + (engine.waiting if engine else 0),
            rows=engine.batch if engine else 0,
            length=engine.length if engine else 0,
            used=engine.used if engine else 0,
            counts=dataclasses.replace(self._counts),
        )

    def release(self) -> None:
        """Waits until everything has been answered, then frees the cache."""
        while True:
            with self._lock:  # no thread begins with a cache that is about to go
                thread = self._thread
                if thread is None:
                    self._engine = None
                    return
            thread.join()

    # --- the service's thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                if not self._take_mail():
                    return
                self._expire()
                self._feed()
                self._advance()
            except Exception as error:  # whatever it is, the callers hear of it and the service lives on
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Ends what the engine was doing, or else what it could not begin with."""
        self._engine = None  # an interrupted step may have given its buffers away
        if not self._answers and self._backlog:
            self._tell(self._backlog.popleft(), error)
        for id in list(self._answers):
            self._end(id, error)

    def _take_mail(self) -> bool:
        """Takes what has been asked meanwhile; false, which ends the thread, if there is nothing left to do."""
        with self._lock:
            self._backlog += self._inbox
            cancelled = set(self._cancelled)
            self._inbox, self._cancelled = [], []
            self._backlog = deque(request for request in self._backlog if request not in cancelled)
            for id in [id for id, (request, _) in self._answers.items() if request in cancelled]:
                self._end(id)
            if self._backlog or self._answers:
                return True
            if self._engine:
                self._engine.reset()  # a dispatch may be under way
            self._thread = None
            return False

    def _expire(self) -> None:
        """Gives up what has taken too long."""

        def is_late(request: Request) -> bool:
            return request.timeout is not None and time.perf_counter() - request.called > request.timeout

        def late(request: Request) -> RequestTimeoutError:
            return RequestTimeoutError(f"not finished within {request.timeout:g} s")

        for id in [id for id, (request, _) in self._answers.items() if is_late(request)]:
            self._end(id, late(self._answers[id][0]))
        for request in [request for request in self._backlog if is_late(request)]:
            self._backlog.remove(request)
            self._tell(request, late(request))

    def _feed(self) -> None:
        """Gives the engine what it has room for, after making the room that can be made."""
        if self._backlog:
            self._make_room()
        while self._backlog and self._engine and self._positions(self._backlog[0]) <= self._engine.length:
            request = self._backlog.popleft()
            answer = Answer(self._tokenizer, request.prompt, request.params, request.called)
            try:
                id = self._engine.submit(request.prompt, request.params, request.constraint)
            except Exception as error:  # of its constraint
                self._tell(request, error)
            else:
                self._answers[id] = request, answer

    def _positions(self, request: Request) -> int:
        return cache_length(self._steps, request.prompt, answer_limit(self._steps, request.prompt, request.params))

    def _make_room(self) -> None:
        """Brings the cache to the shape that all requests need, or as close to it as memory allows.

        While rows are in use it only grows, if there is memory for the old and the new one; else what has no room
        waits. The first request fails if it has none even alone.
        """
        config, engine, busy = self._steps.runtime.engine, self._engine, bool(self._answers)
        present = (engine.batch, engine.length) if engine else None
        least_rows, least_length = present if busy else (1, self._shape[1])
        wanted = min(round_up(len(self._backlog) + len(self._answers), config.batch_buckets), config.max_batch)
        wanted = max(self._shape[0], wanted, least_rows)
        rows = sorted({wanted, least_rows, *(n for n in config.batch_buckets if least_rows < n < wanted)}, reverse=True)
        needed = [self._positions(request) for request in self._backlog]
        lengths = [round_up(max(least_length, n), config.cache_buckets) for n in (max(needed), needed[0])]
        own = self._plan(*present).state if engine and not busy else 0
        shapes = [(n, length) for length in dict.fromkeys(lengths) for n in rows]
        shape = next((s for s in shapes if s == present or self._lack(*s, own) is None), None)
        if shape is None and not busy:
            self._tell(self._backlog.popleft(), self._lack(*shapes[-1], own))
        if shape is None or shape == present:
            return
        if self._report:
            self._report(self._plan(*shape))
        if busy or (engine and self._lack(*shape) is None):
            engine.resize(*shape)
        else:
            self._engine = engine = None  # its memory is free before the next one is made
            self._engine = Engine(self._steps, self._weights, *shape, self._counts)

    def _plan(self, rows: int, length: int) -> MemoryPlan:
        fitting = (r.prompt for r in self._backlog if len(r.prompt.token_ids) <= length)
        media = (sum(m.num_tokens for m in (*prompt.images, *prompt.audios)) for prompt in fitting)
        return plan_memory(self._steps, rows, length, sum(heapq.nlargest(rows, media)))

    def _lack(self, rows: int, length: int, freed: int = 0) -> MemoryPlanError | None:
        """What is missing for a cache once so many bytes have been freed; None if there is enough."""
        available = available_memory(self._steps.mesh.devices.flat[0])
        try:
            self._plan(rows, length).check(None if available is None else available + freed, weights_loaded=True)
        except MemoryPlanError as error:
            return error
        return None

    def _advance(self) -> None:
        """Runs the engine once and hands on what it says."""
        if not self._engine:
            return
        config = self._steps.runtime.engine
        # An answer under a constraint gets a token with a dispatch at most, which must not be a long one.
        hurried = any(request.streaming or request.constraint for request, _ in self._answers.values())
        pace = (config.stream_steps, 1) if hurried else (config.decode_steps, None)
        for event in self._engine.step(*pace):
            if event.request not in self._answers:  # ended by a stop string; these tokens were under way
                continue
            if event.error:
                self._end(event.request, event.error)
                continue
            request, answer = self._answers[event.request]
            piece = answer.push(event)
            if answer.finish_reason:
                self._end(event.request)
            self._tell(request, piece)

    def _end(self, id: int, error: Exception | None = None) -> None:
        request, _ = self._answers.pop(id)
        if self._engine:
            self._engine.cancel(id)
        if error:
            self._tell(request, error)

    def _tell(self, request: Request, said: Piece | Exception) -> None:
        try:
            request.receive(said)
        except Exception:
            logger.exception("a request ends: what was to receive its answer failed")
            self.cancel(request)
