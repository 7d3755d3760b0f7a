"""What the endpoints work with: the model, the service that answers, and the threads that make prompts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from phi4mm_jax.api import Phi4MM
from phi4mm_jax.processing.display import quote
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.runtime.steps import Steps
from phi4mm_jax.service import QueueFullError, Service
from phi4mm_jax.serving.answers import Answers, Question
from phi4mm_jax.serving.capacity import choose_capacity
from phi4mm_jax.serving.errors import ApiError
from phi4mm_jax.serving.formats import LogprobsFormat
from phi4mm_jax.serving.grammar import Grammars
from phi4mm_jax.serving.metrics import Metrics
from phi4mm_jax.serving.settings import ServerSettings

T = TypeVar("T")


class Backend:
    """One model, served. Its asynchronous methods belong to one event loop."""

    def __init__(self, model: Phi4MM, settings: ServerSettings):
        """Takes a model over; memory for the cache is taken with the first request.

        Raises:
          ConfigError, MemoryPlanError: rows and context cannot be had.
        """
        self.settings = settings
        self.capacity = choose_capacity(model.steps, settings.rows, settings.context)
        limits = {"max_batch": self.capacity.rows, "max_seq_len": self.capacity.context}
        steps = Steps(model.steps.model, model.steps.runtime.override(engine=limits), model.steps.mesh)
        self.config, self.engine = steps.model, steps.runtime.engine
        self.processor = Processor(
            model.processor.config, model.processor.tokenizer, settings.media, max_tokens=self.capacity.context
        )
        self.service = Service(
            steps,
            model.weights,
            self.processor.tokenizer,
            shape=(self.capacity.rows, self.capacity.length),
            max_waiting=settings.max_waiting,
        )
        self.grammars = Grammars(self.processor.tokenizer, steps.model.text.vocab_size, steps.model.tokens.eos)
        self.metrics = Metrics(self.service)
        self.logprobs = LogprobsFormat(self.processor.tokenizer, steps.model.tokens.eos)
        self.model_names = settings.model_names or (model.name, "default")
        self.created = int(time.time())
        self.ready = False
        self._threads = ThreadPoolExecutor(settings.preparing_threads, thread_name_prefix="phi4mm-prepare")
        self._preparing = 0

    def check_model(self, name: str | None) -> None:
        """Raises an ApiError, 404, if no model has this name; None is whatever there is."""
        if name is not None and name not in self.model_names and not self.settings.any_model_name:
            known = ", ".join(self.model_names)
            raise ApiError(
                404, f"model: there is no {quote(name)} here but {known}", param="model", code="model_not_found"
            )

    def check_count(self, answers: int) -> None:
        """Raises an ApiError if so many answers can never be asked for at once."""
        most = self.settings.max_waiting
        if answers > most:
            raise ApiError(400, f"{answers} answers are asked for at once; at most {most} are accepted", param="n")

    async def prepare(self, make: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Calls what may take long, such as decoding pictures, on a thread.

        Raises:
          QueueFullError: too many calls and requests wait already.
        """
        waiting = self._preparing + self.service.load().waiting
        if waiting >= self.settings.max_waiting:
            raise QueueFullError(f"{waiting} requests are waiting and no more may; try again later")
        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, partial(make, *args, **kwargs))
        finally:
            self._preparing -= 1

    def ask(self, questions: Sequence[Question], *, called: float, streaming: bool = False) -> Answers:
        """Asks the model; see `Answers`."""
        return Answers(
            self.service,
            self.metrics,
            questions,
            called=called,
            timeout=self.settings.request_timeout_s,
            streaming=streaming,
        )

    def close(self) -> None:
        """Waits until nothing runs, then gives memory and threads back."""
        self._threads.shutdown(cancel_futures=True)
        self.service.release()


def _backend(request: Request) -> Backend:
    return request.app.state.backend


TheBackend = Annotated[Backend, Depends(_backend)]
"""The argument by which an endpoint gets the backend."""
