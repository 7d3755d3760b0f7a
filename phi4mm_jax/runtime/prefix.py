"""What the rows of the cache hold, and which of it a new prompt can begin with."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from phi4mm_jax.processing.prompt import Prompt
from phi4mm_jax.runtime.encoding import Medium

WORTH_COPYING = 32
"""Tokens: fewer are sooner computed than found in another row."""


@dataclasses.dataclass(frozen=True, eq=False)
class Contents:
    """What determines the keys and values of a row: equal entries, of equal kind, mean equal ones."""

    keys: np.ndarray
    """[T] int64: the token of each position; where there is media, what and which part of it."""
    kind: tuple[str | None, bool]
    """LoRA adapter and whether the rope regime is the long one."""

    def shared(self, other: Contents) -> int:
        """Positions from the first on in which two rows are alike."""
        if self.kind != other.kind:
            return 0
        length = min(len(self.keys), len(other.keys))
        differ = self.keys[:length] != other.keys[:length]
        return int(np.argmax(differ)) if differ.any() else length

    def first(self, length: int) -> Contents:
        """The first positions alone."""
        return Contents(self.keys[:length], self.kind)


NOTHING = Contents(np.zeros(0, np.int64), (None, False))


def prompt_keys(prompt: Prompt, media: Sequence[Medium]) -> np.ndarray:
    """The keys of a prompt's positions [T] int64: tokens are not negative, parts of media are."""
    keys = prompt.token_ids.astype(np.int64)
    for medium in media:
        start = int.from_bytes(medium.key[:8], "little") >> 2
        keys[medium.where] = -1 - start - np.arange(len(medium.where))
    return keys


@dataclasses.dataclass(frozen=True)
class Choice:
    """Where a new row goes, and what it begins with."""

    slot: int
    """The row of the cache."""
    source: int
    """The row that holds the beginning, which may be the same one."""
    length: int
    """Positions of the beginning."""


def choose_slot(wanted: Contents, held: Sequence[Contents], free: Collection[int], last_used: Sequence[int]) -> Choice:
    """Finds a row of the cache for a prompt.

    A row that holds what the prompt begins with is gone on with, or the beginning is copied to the free row that has
    been idle for longest: whichever loses less of what the cache holds.

    Args:
      wanted: the prompt; of its last token at least something has to be computed.
      held: what each row holds.
      free: rows that no request uses; at least one.
      last_used: when each row was used last, in any unit.
    """
    shared = [min(contents.shared(wanted), len(wanted.keys) - 1) for contents in held]
    source = max(range(len(held)), key=lambda slot: (shared[slot], slot in free, last_used[slot]))
    length = shared[source]
    others = set(free) - {source}
    target = min(others, key=lambda slot: (len(held[slot].keys) > 0, last_used[slot]), default=source)
    if source in free:
        lost = len(held[source].keys) - length
        if target == source or (length and lost <= max(WORTH_COPYING, len(held[target].keys))):
            return Choice(source, source, length)
    return Choice(target, source, length) if length >= WORTH_COPYING else Choice(target, target, 0)
