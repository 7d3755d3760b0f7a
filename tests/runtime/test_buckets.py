import pytest

from phi4mm_jax.runtime.buckets import plan_chunks, round_up, split_exactly

BUCKETS = [(64, 256, 1024), (32, 64, 128, 256, 512), (16, 64), (7,)]


def test_round_up():
    assert [round_up(n, (2, 5)) for n in (1, 2, 3, 5, 6, 10, 11)] == [2, 2, 5, 5, 10, 10, 15]


@pytest.mark.parametrize("buckets", [(1,), (1, 2), (1, 2, 4, 8), (1, 3, 7)])
def test_split_exactly(buckets):
    for count in range(60):
        parts = split_exactly(count, buckets)
        assert sum(parts) == count
        assert set(parts) <= set(buckets)
        assert parts == sorted(parts, reverse=True)


@pytest.mark.parametrize("padding", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("buckets", BUCKETS, ids=str)
def test_plan_chunks(buckets, padding):
    for length in range(1, 3 * buckets[-1] + 2):
        chunks = plan_chunks(length, buckets, padding)
        assert set(chunks) <= set(buckets)
        before = sum(chunks[:-1])
        assert before < length <= sum(chunks)  # nothing missing, and only the last chunk is padded
        assert chunks == sorted(chunks, reverse=True)
        rest, last = length - before, chunks[-1]
        assert last == round_up(rest, buckets)
        smaller = [b for b in buckets if b < rest]
        assert last <= rest * (1 + padding) or not smaller


def test_plan_chunks_uses_few():
    """With generous padding a prompt within the largest bucket takes one call."""
    assert plan_chunks(600, (64, 256, 1024), 1.0) == [1024]
    assert plan_chunks(500, (64, 256, 1024), 1.0) == [256, 256]
    assert plan_chunks(2500, (64, 256, 1024), 1.0) == [1024, 1024, 256, 256]
    assert plan_chunks(0, (64,), 1.0) == []
