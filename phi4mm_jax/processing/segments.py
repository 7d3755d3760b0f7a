"""Long recordings to parts that a model hears one after the other: cuts fall into silences, not into words."""

from __future__ import annotations

import numpy as np

_HOP_S = 0.01
"""Distance of the places where a cut may fall."""
_SMOOTHING_S = 0.2
"""Width of the window of which the energy is taken; the closure of a consonant is shorter, a pause is not."""


def split_at_silences(samples: np.ndarray, rate: int, longest_s: float) -> list[tuple[int, int]]:
    """Cuts a recording at the quietest places that keep every part short enough.

    A part ends where the energy, smoothed over a fifth of a second, is least within the last third of what it may
    hold; of equally quiet places at the latest. So no part but a lone one is shorter than a third of `longest_s`. Sound
    that is equally loud throughout is cut somewhere there, and silence makes parts like anything else.

    Args:
      samples: [n] float.
      rate: in Hz.
      longest_s: seconds that a part has at most.

    Returns:
      (start, end) of each part, as indices of samples; every part begins where the one before ends. None if there are
      no samples.

    Raises:
      ValueError: `longest_s` is less than one sample.
    """
    longest = int(longest_s * rate)
    if longest < 1:
        raise ValueError(f"longest_s = {longest_s:g}: expected at least one sample, 1 / {rate} s")
    count, shortest = len(samples), longest // 3
    hop = max(1, min(int(_HOP_S * rate), shortest))
    loudness = _loudness(samples, rate, hop) if count > longest else None
    cuts = [0]
    while count - cuts[-1] > longest:
        latest = min(cuts[-1] + longest, count - shortest)  # leaves enough for the last part
        first, last = -(-(latest - shortest) // hop), latest // hop
        quietest = last - np.argmin(loudness[first : last + 1][::-1])
        cuts.append(int(quietest) * hop)
    ends = [*cuts[1:], count] if count else []
    return list(zip(cuts, ends, strict=False))


def _loudness(samples: np.ndarray, rate: int, hop: int) -> np.ndarray:  # [n // hop + 1] float32
    """Energy around each place between two hops, under a window that peaks there: even a short gap has one minimum."""
    hops = samples[: len(samples) // hop * hop].reshape(-1, hop)
    energy = np.einsum("ij,ij->i", hops, hops)
    half = max(1, round(_SMOOTHING_S / 2 * rate / hop))
    window = np.hanning(2 * half + 2)[1:-1].astype(np.float32)
    return np.convolve(np.pad(energy, half, mode="edge"), window, mode="valid")
