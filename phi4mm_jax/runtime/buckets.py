"""Static shapes: how lengths and counts are rounded, so that nothing compiles anew from request to request."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


def round_up(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`; beyond the last one, the next multiple of it."""
    return next((b for b in buckets if b >= size), -(-size // buckets[-1]) * buckets[-1])


def split_exactly(count: int, buckets: Sequence[int]) -> list[int]:
    """Writes `count` as a sum of buckets, largest first. `buckets` begins with 1, so nothing is padded."""
    parts = []
    for bucket in reversed(buckets):
        parts += [bucket] * (count // bucket)
        count %= bucket
    return parts


@lru_cache(maxsize=4096)
def plan_chunks(length: int, buckets: tuple[int, ...], call_cost: int) -> tuple[int, ...]:
    """The cheapest chunk lengths that cover `length` tokens; only the last chunk is padded.

    Args:
      length: tokens to cover.
      buckets: increasing chunk lengths. What passes the largest is cut into chunks of that.
      call_cost: what a call costs on top of its tokens, in tokens: the weights are read anew.

    Returns:
      The chunk lengths, largest first.
    """
    if length <= 0:
        return ()
    if length > buckets[-1]:
        whole = (length - 1) // buckets[-1]
        return buckets[-1:] * whole + plan_chunks(length - whole * buckets[-1], buckets, call_cost)
    plans = [(b, *plan_chunks(length - b, buckets[: i + 1], call_cost)) for i, b in enumerate(buckets) if b < length]
    return min([*plans, (round_up(length, buckets),)], key=lambda plan: (sum(plan) + call_cost * len(plan), len(plan)))
