import time

import numpy as np
import pytest

from phi4mm_jax.processing.segments import split_at_silences

RATE = 16_000


def noise(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32)


def speech(bursts: list[float], gap: float, floor: float = 0.0) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Bursts of noise of these seconds with gaps between them, and where the gaps are, in samples."""
    parts, gaps, at = [], [], 0
    for i, seconds in enumerate(bursts):
        parts += [noise(seconds, i), floor * noise(gap, 1000 + i)]
        at += len(parts[-2])
        gaps.append((at, at + len(parts[-1])))
        at += len(parts[-1])
    return np.concatenate(parts), gaps


def assert_tiles(parts: list[tuple[int, int]], count: int, longest: int) -> None:
    assert [start for start, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == count
    lengths = [end - start for start, end in parts]
    assert max(lengths) <= longest
    if len(parts) > 1:
        assert min(lengths) >= longest // 3


@pytest.mark.parametrize("gap", [0.06, 0.1, 0.3, 1.5])
@pytest.mark.parametrize("floor", [0.0, 0.02])
def test_cuts_fall_into_gaps(gap: float, floor: float) -> None:
    bursts = np.random.default_rng(7).uniform(0.5, 2.5, 60).tolist()
    samples, gaps = speech(bursts, gap, floor)
    parts = split_at_silences(samples, RATE, 10.0)
    assert_tiles(parts, len(samples), 10 * RATE)
    assert len(parts) >= len(samples) / (10 * RATE)
    for _, end in parts[:-1]:
        assert any(start < end < stop for start, stop in gaps), end / RATE


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_the_quietest_gap_is_taken(rate: int) -> None:
    samples = noise(45, rate=rate)
    for seconds, level in ((21.0, 0.3), (24.0, 0.01), (27.0, 0.3), (5.0, 0.0)):  # the last lies too early
        samples[int(seconds * rate) : int((seconds + 0.5) * rate)] *= level
    (_, cut), *_ = split_at_silences(samples, rate, 28.0)
    assert 24.0 < cut / rate < 24.5


def test_silence_around_a_word_is_not_a_reason_to_cut_it() -> None:
    samples = np.zeros(60 * RATE, np.float32)
    samples[int(24.5 * RATE) : int(25.5 * RATE)] = noise(1.0)
    parts = split_at_silences(samples, RATE, 25.0)
    assert_tiles(parts, len(samples), 25 * RATE)
    assert not any(24.5 < end / RATE < 25.5 for _, end in parts)


def test_what_fits_is_left_whole() -> None:
    assert split_at_silences(noise(10), RATE, 10.0) == [(0, 10 * RATE)]
    assert split_at_silences(noise(0), RATE, 10.0) == []
    assert split_at_silences(np.zeros(1, np.float32), RATE, 10.0) == [(0, 1)]
    with pytest.raises(ValueError, match="longest_s = 0: expected at least one sample"):
        split_at_silences(noise(1), RATE, 0.0)


def test_a_little_too_long_leaves_no_sliver() -> None:
    first, second = split_at_silences(noise(10.01), RATE, 10.0)
    assert second[1] - second[0] >= 3.3 * RATE and first[1] - first[0] >= 3.3 * RATE


TONE = np.sin(np.arange(70 * RATE) * (2 * np.pi * 440 / RATE)).astype(np.float32)
CHORDS = TONE * np.repeat(np.random.default_rng(3).uniform(0.3, 1.0, 140), RATE // 2).astype(np.float32)


@pytest.mark.parametrize(
    "samples",
    [noise(70), TONE, CHORDS, TONE + np.float32(0.5), np.zeros(70 * RATE, np.float32), np.full(70 * RATE, 16.0)],
    ids=["noise", "tone", "chords", "offset", "silence", "constant"],
)
def test_sound_without_pauses(samples: np.ndarray) -> None:
    parts = split_at_silences(samples, RATE, 30.0)
    assert_tiles(parts, len(samples), 30 * RATE)
    assert len(parts) in (3, 4)
    assert parts == split_at_silences(samples, RATE, 30.0)


def test_hours_take_a_moment() -> None:
    samples = np.tile(noise(60), 180)
    began = time.perf_counter()
    assert_tiles(split_at_silences(samples, RATE, 30.0), len(samples), 30 * RATE)
    assert time.perf_counter() - began < 5


def test_parts_tile_whatever_there_is() -> None:
    generator = np.random.default_rng(0)
    for _ in range(300):
        rate = int(generator.choice([1, 50, 100, 1_000, 8_000]))
        count, longest = int(10 ** generator.uniform(0, 4)), int(10 ** generator.uniform(0, 3.5))
        samples = generator.normal(size=count) * (generator.random(count) < 0.5)  # much of it exactly zero
        assert_tiles(split_at_silences(samples.astype(np.float32), rate, (longest + 0.5) / rate), count, longest)
