"""How far a long read or write is: a bar on a terminal, plain lines elsewhere, both on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

_SECONDS_PER_LINE = 5.0

T = TypeVar("T")


def track(
    done: Iterable[T], nbytes: Callable[[T], int], *, action: str, of: str, count: int, total: int, show: bool
) -> Iterator[T]:
    """Passes on what is done, one by one, and reports it.

    Args:
      done: members of the work, each yielded when it has been done.
      nbytes: the bytes of one.
      action: what is being done: "Loading weights".
      of: what the members are: "tensors".
      count: how many there will be.
      total: their bytes.
      show: report at all.
    """
    terminal = sys.stderr.isatty()
    finished, last_line = 0, time.monotonic()
    with tqdm(total=total, desc=action, unit="B", unit_scale=True, disable=not (show and terminal)) as bar:
        for number, member in enumerate(done, start=1):
            yield member
            finished += nbytes(member)
            bar.update(nbytes(member))
            now = time.monotonic()
            if show and not terminal and (now - last_line > _SECONDS_PER_LINE or number == count):
                last_line = now
                size = f"{finished / 1e9:.1f} of {total / 1e9:.1f} GB"
                print(f"{action}: {number} of {count} {of}, {size}", file=sys.stderr, flush=True)
