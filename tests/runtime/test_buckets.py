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


@pytest.mark.parametrize("call_cost", [0, 32, 256])
@pytest.mark.parametrize("buckets", BUCKETS, ids=str)
def test_plan_chunks(buckets, call_cost):
    for length in range(1, 3 * buckets[-1] + 2):
        chunks = plan_chunks(length, buckets, call_cost)
        assert set(chunks) <= set(buckets)
        assert sum(chunks[:-1]) < length <= sum(chunks)  # nothing missing, and only the last chunk is padded
        assert list(chunks) == sorted(chunks, reverse=True)
        # Each number of largest chunks before one padded chunk is a plan too: none of them is cheaper.
        rest = length - (length - 1) // buckets[-1] * buckets[-1]
        simple = length - rest + round_up(rest, buckets) + call_cost * ((length - rest) // buckets[-1] + 1)
        assert sum(chunks) + call_cost * len(chunks) <= simple


def test_plan_chunks_weighs_padding_against_calls():
    assert plan_chunks(600, (64, 256, 1024), 256) == (1024,)
    assert plan_chunks(500, (64, 256, 1024), 256) == (256, 256)
    assert plan_chunks(2500, (64, 256, 1024), 256) == (1024, 1024, 256, 256)
    assert plan_chunks(40, (32, 64, 128), 32) == (64,)
    assert plan_chunks(300, (32, 64, 128, 256, 512), 32) == (256, 64)
    assert plan_chunks(300, (32, 64, 128, 256, 512), 0) == (256, 64)
    assert plan_chunks(0, (64,), 1) == ()
