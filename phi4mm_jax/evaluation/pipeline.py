"""From rows of a dataset to prompts, which several threads make ahead of their use and hand out long ones first."""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import CancelledError
from typing import Any

import grain
from grain.experimental import ThreadPrefetchIterDataset

from phi4mm_jax.evaluation.items import Item
from phi4mm_jax.evaluation.sources import Source
from phi4mm_jax.evaluation.tasks.task import Task
from phi4mm_jax.processing.audio import load_audio
from phi4mm_jax.processing.display import shorten
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.prompt import Prompt


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """An item with its prompt, or with the reason why it has none."""

    item: Item
    """Of a row that no item can be made of, one with nothing but the row's number."""
    prompt: Prompt | None = None
    """What to answer."""
    error: str | None = None
    """Why there is no prompt, in one line."""
    audio_seconds: float = 0.0
    """Of its recordings together, as decoded."""

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.token_ids) if self.prompt else 0

    @property
    def nbytes(self) -> int:
        """About what its features take in memory."""
        media = (*self.prompt.images, *self.prompt.audios) if self.prompt else ()
        return sum(value.nbytes for medium in media for value in vars(medium).values() if hasattr(value, "nbytes"))


def prepare(
    task: Task,
    source: Source,
    processor: Processor,
    *,
    rows: Sequence[int],
    done: Set[str] = frozenset(),
    window: int = 64,
    workers: int = 4,
    max_bytes: int = 6 << 30,
) -> Iterator[Prepared]:
    """Yields the items of some rows, window by window, and within each the longest prompts first.

    While one window is consumed the next is being prepared. An item that cannot be asked is yielded with an error. The
    order depends on the arguments alone, but not on `workers`. Closing the iterator ends the work.

    Args:
      task: what is asked.
      source: its rows.
      processor: of the model; what exceeds its limits is an error of the item.
      rows: their numbers.
      done: ids of items that are left out.
      window: how many items are sorted among each other.
      workers: threads. What costs time, decoding and transforming media, happens outside of Python's lock.
      max_bytes: about how much the features of all windows may take in memory; it shortens windows.

    Raises:
      EvaluationError: the source cannot be read any more.
    """
    stopped = threading.Event()

    def prepared(number: int) -> list[Prepared]:
        if stopped.is_set():
            raise CancelledError
        row = source[number]
        try:
            items = task.items(number, row, source.directory)
        except Exception as error:  # whatever a row may lack
            return [Prepared(item=Item(id=str(number), name=str(number)), error=_line(error))]
        return [_prepared(item, processor) for item in items if item.id not in done]

    wanted = [number for number in rows if str(number) not in done]
    ahead = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    dataset = grain.MapDataset.source(wanted).map(prepared).to_iter_dataset(ahead)
    # There are three at most: one that is consumed, one that is ready, one that is being filled.
    windows = iter(ThreadPrefetchIterDataset(_Windows(dataset, window, max_bytes // 3), prefetch_buffer_size=1))
    try:
        for items in windows:
            while items:
                yield items.popleft()
    finally:
        stopped.set()
        windows.close()


def _prepared(item: Item, processor: Processor) -> Prepared:
    try:
        recordings = [load_audio(source, processor.limits) for source in item.audios]
        content: list[dict[str, Any]] = [{"type": "image", "image": source} for source in item.images]
        content += ({"type": "audio", "audio": recording} for recording in recordings)
        content.append({"type": "text", "text": item.prompt})
        prompt = processor.conversation([{"role": "user", "content": content}])
    except Exception as error:  # one odd item of thousands ends nothing
        return Prepared(item=item, error=_line(error))
    return Prepared(item=item, prompt=prompt, audio_seconds=sum(len(samples) / rate for samples, rate in recordings))


def _line(error: Exception) -> str:
    is_ours = isinstance(error, ValueError)  # such as MediaError, whose messages say all
    return shorten(" ".join(str(error).split()) if is_ours else repr(error), 300)


class _Windows(grain.IterDataset):
    """Windows of consecutive items, each sorted by length."""

    def __init__(self, rows: grain.IterDataset, size: int, max_bytes: int):
        super().__init__(rows)
        self._size, self._max_bytes = size, max_bytes

    def __iter__(self) -> grain.DatasetIterator:
        return _WindowIterator(iter(self._parent), self._size, self._max_bytes)


class _WindowIterator(grain.DatasetIterator):
    def __init__(self, rows: grain.DatasetIterator, size: int, max_bytes: int):
        super().__init__(rows)
        self._size, self._max_bytes = size, max_bytes
        self._left: deque[Prepared] = deque()  # of the last row

    def __next__(self) -> deque[Prepared]:
        items, size = [], 0
        while len(items) < self._size and size < self._max_bytes:
            while not self._left:
                try:
                    self._left.extend(next(self._parent))
                except StopIteration:
                    if not items:
                        raise
                    return self._sorted(items)
            items.append(self._left.popleft())
            size += items[-1].nbytes
        return self._sorted(items)

    def _sorted(self, items: list[Prepared]) -> deque[Prepared]:
        return deque(sorted(items, key=lambda prepared: -prepared.length))

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)
