"""Asks a model the items of a task, as many at a time as there are rows, and writes down each answer as it comes."""

from __future__ import annotations

import dataclasses
import queue
import time
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np

from phi4mm_jax.answer import Output, Piece
from phi4mm_jax.evaluation.items import Answered, EvaluationError, Item
from phi4mm_jax.evaluation.metrics.metric import Metric
from phi4mm_jax.evaluation.pipeline import Prepared
from phi4mm_jax.evaluation.progress import Progress
from phi4mm_jax.evaluation.store import Store
from phi4mm_jax.evaluation.tasks.task import Task
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.runtime.compilation import clock
from phi4mm_jax.runtime.limits import RequestError, answer_limit
from phi4mm_jax.runtime.memory import MemoryPlanError
from phi4mm_jax.runtime.sampling import SamplingParams
from phi4mm_jax.runtime.steps import Steps, Weights
from phi4mm_jax.service import Request, Service

_MOST_BYTES = 2 << 30
"""That the features of items which have been asked may take on the host, about."""


class Session:
    """One run of the program over what is left of a task."""

    def __init__(
        self,
        steps: Steps,
        weights: Weights,
        tokenizer: Tokenizer,
        task: Task,
        metric: Metric,
        store: Store,
        progress: Progress,
    ):
        """Joins the parts; what is kept of earlier requests would make it look fast, so it has a service of its own.

        Args:
          steps: of the model.
          weights: what they run on.
          tokenizer: of the model.
          task: what is asked.
          metric: of the task, for the score so far.
          store: takes the answers.
          progress: is shown each.
        """
        self._steps, self._store, self._progress = steps, store, progress
        self._service = Service(steps, weights, tokenizer)
        self._params, self._metric = SamplingParams(max_tokens=task.max_tokens, ignore_eos=task.ignore_eos), metric
        self._name = uuid.uuid4().hex[:12]
        self._begun = clock()
        self._asked: dict[str, tuple[Prepared, Request, list[Piece]]] = {}  # by item
        self._said: queue.SimpleQueue[tuple[str, Piece | Exception]] = queue.SimpleQueue()
        self._bytes = 0  # of their features
        self._no_room: list[tuple[Prepared, MemoryPlanError]] = []  # since the last answer
        self._sums: np.ndarray | float = 0.0
        for answered in store.answered:
            self._add(answered)

    def run(self, prepared: Iterator[Prepared], loading_seconds: float) -> None:
        """Asks everything; what has been answered is kept whatever happens.

        Args:
          prepared: the items that are left.
          loading_seconds: what the model took to load, to be noted.

        Raises:
          MemoryPlanError: several items in a row, the last ones, had no room.
          Exception: whatever the model fails with that no single item is to blame for.
        """
        complete = False
        begun, self._begun = time.perf_counter(), clock()
        try:
            self._ask_all(prepared)
            complete = True
        finally:
            for _, request, _ in self._asked.values():
                self._service.cancel(request)
            self._service.release()
            seconds = clock() - self._begun
            self._store.end_session(
                dataclasses.asdict(self._service.load().counts)
                | {"session": self._name, "complete": complete, "rows": self._steps.runtime.engine.max_batch}
                | {"seconds": seconds, "warm_up_seconds": time.perf_counter() - begun - seconds}
                | {"loading_seconds": loading_seconds}
            )

    def _ask_all(self, prepared: Iterator[Prepared]) -> None:
        ahead = 2 * self._steps.runtime.engine.max_batch  # rows that end are taken at once
        first: list[Request] | None = []  # asked together, so that the cache gets its rows at once
        for item in prepared:
            self._listen(wait=False)
            request = self._request(item)
            if request is None:
                continue
            self._asked[item.item.id] = item, request, []
            self._bytes += item.nbytes
            if first is None:
                self._service.submit([request])
            else:
                first.append(request)
            while self._asked and (len(self._asked) >= ahead or self._bytes >= _MOST_BYTES):
                if first:
                    self._service.submit(first)
                    first = None
                self._listen(wait=True)
        if first:
            self._service.submit(first)
        while self._asked:
            self._listen(wait=True)
        if self._no_room:  # and nothing has been answered since
            raise self._no_room[0][1]

    def _request(self, item: Prepared) -> Request | None:
        """What to ask; None for an item that cannot be asked or scored, which is written down."""
        try:
            self._metric.measure("", item.item.references, item.item.facts)
        except EvaluationError as error:
            item = Prepared(item=Item(id=item.item.id, name=item.item.name), error=str(error))
        if item.prompt is not None:
            try:
                answer_limit(self._steps, item.prompt, self._params)
            except RequestError as error:
                item = dataclasses.replace(item, error=str(error))
        if item.error is not None:
            self._write(item, error=item.error)
            return None
        id = item.item.id
        return Request(prompt=item.prompt, params=self._params, receive=lambda said: self._said.put((id, said)))

    def _listen(self, wait: bool) -> None:
        """Writes down the answers that have come; waits for something to come if told to."""
        while wait or not self._said.empty():
            id, said = self._said.get()
            wait = False
            item, _, pieces = self._asked[id]
            if isinstance(said, Exception) and not isinstance(said, MemoryPlanError):
                raise said
            if isinstance(said, Piece):
                pieces.append(said)
                if not said.finish_reason:
                    continue
            del self._asked[id]
            self._bytes -= item.nbytes
            if isinstance(said, MemoryPlanError):  # even alone it has no room, which may be the machine's fault
                self._no_room.append((dataclasses.replace(item, prompt=None), said))
                continue
            self._write(item, Output.of(pieces))
            for other, error in self._no_room:
                self._write(other, error=str(error))
            self._no_room = []

    def _write(self, item: Prepared, output: Output | None = None, error: str | None = None) -> None:
        known: dict[str, Any] = {}
        if output:
            known = {
                "prediction": output.text,
                "finish_reason": output.finish_reason,
                "prompt_tokens": output.usage.prompt_tokens,
                "completion_tokens": output.usage.completion_tokens,
                "seconds": output.usage.seconds,
            }
        answered = Answered(
            id=item.item.id,
            name=item.item.name,
            prompt=item.item.prompt,
            references=item.item.references,
            facts=item.item.facts,
            error=error,
            audio_seconds=item.audio_seconds,
            images=len(item.item.images),
            session=self._name,
            elapsed=clock() - self._begun,
            **known,
        )
        self._store.append(answered)
        self._add(answered)
        score = float(self._metric.score(self._sums)) if np.any(self._sums) else None
        self._progress.advance(item.item.id, score, failed=error is not None)

    def _add(self, answered: Answered) -> None:
        """Adds an answer to the score so far, which knows of no groups."""
        numbers = self._metric.measure(answered.prediction, answered.references, answered.facts)
        if len(numbers):
            self._sums = self._sums + np.asarray(numbers, np.float64)
