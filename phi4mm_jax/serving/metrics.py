"""What the server counts, for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from phi4mm_jax.answer import Piece
from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.service import Service
from phi4mm_jax.serving.errors import ApiError

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self, service: Service):
        """Declares them.

        Args:
          service: whose load the gauges read when they are asked.
        """
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"phi4mm_{name}", text, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"phi4mm_{name}", text, labels, registry=registry)

        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first token.", _SECONDS)
        self.inter_token = histogram("inter_token_latency_seconds", "Between a request's tokens.", _TOKEN_SECONDS)
        self.end_to_end = histogram("request_seconds", "From the request to the end of its answer.", _SECONDS)
        self.prompt_tokens = counter("prompt_tokens", "Tokens of answered prompts, media included.")
        self.cached_tokens = counter("cached_prompt_tokens", "Those of them that the cache held already.")
        self.completion_tokens = counter("completion_tokens", "Tokens of answers.")
        self.requests = counter("requests", "Prompts that were asked, by what they hold.", "modality")
        self.finished = counter("answers", "Answers that came to their end, by what ended them.", "finish_reason")
        self.errors = counter("errors", "Error answers, by OpenAI's type and HTTP status.", "type", "status")
        for name, text, field in (
            ("requests_running", "Requests that have a row of the cache.", "running"),
            ("requests_waiting", "Requests that wait for a row.", "waiting"),
            ("cache_rows", "Rows of the cache.", "rows"),
            ("cache_row_positions", "Positions of each row of the cache.", "length"),
            ("cache_positions_used", "Positions that running requests fill.", "used"),
        ):
            gauge = Gauge(f"phi4mm_{name}", text, registry=registry)
            gauge.set_function(lambda field=field: getattr(service.load(), field))

    def count_error(self, error: ApiError) -> None:
        """Counts an error answer."""
        self.errors.labels(error.type, str(error.status_code)).inc()

    def watch(self, prompt: Prompt, called: float) -> Watch:
        """Counts a prompt and returns what takes the pieces of its answer."""
        self.requests.labels(prompt.mode.name.lower()).inc()
        return Watch(self, called)


class Watch:
    """One answer, as the metrics see it."""

    def __init__(self, metrics: Metrics, called: float):
        """Begins when the caller asked, `time.perf_counter` seconds."""
        self._metrics, self._called = metrics, called
        self._last: float | None = None

    def take(self, piece: Piece) -> None:
        """Counts a piece; tokens that come together share the time since those before."""
        now, tokens = time.perf_counter(), len(piece.token_ids)
        if self._last is None:
            self._metrics.first_token.observe(now - self._called)
        else:
            for _ in range(tokens):
                self._metrics.inter_token.observe((now - self._last) / tokens)
        self._last = now
        if piece.usage:
            self._metrics.end_to_end.observe(now - self._called)
            self._metrics.prompt_tokens.inc(piece.usage.prompt_tokens)
            self._metrics.cached_tokens.inc(piece.usage.cached_tokens)
            self._metrics.completion_tokens.inc(piece.usage.completion_tokens)
            self._metrics.finished.labels(piece.finish_reason).inc()
