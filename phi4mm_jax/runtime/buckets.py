"""Static shapes: how lengths and counts are rounded, so that nothing compiles anew from request to request."""

from __future__ import annotations

from collections.abc import Sequence


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


def plan_chunks(length: int, buckets: Sequence[int], padding: float) -> list[int]:
    """Chunk lengths whose sum covers `length` tokens; only the last chunk is padded.

    Args:
      length: tokens to cover.
      buckets: increasing chunk lengths.
      padding: most padding of the last chunk, as a share of its real tokens; with more, a smaller chunk is cut off
        first (where there is one).

    Returns:
      The chunk lengths in order.
    """
    chunks = []
    while length > 0:
        if length > buckets[-1]:
            chunk = buckets[-1]
        else:
            chunk = round_up(length, buckets)
            smaller = [b for b in buckets if b < length]
            if smaller and chunk > length * (1 + padding):
                chunk = smaller[-1]
        chunks.append(chunk)
        length -= chunk
    return chunks
