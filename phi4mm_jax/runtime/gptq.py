"""Rounding a weight so that its products stay the same, given what it is multiplied with (GPTQ, arXiv 2210.17323)."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized import Format, QuantizedArray, best_ranges

_DAMPING = 0.01
"""Share of the mean square that is added to every input's, for those that were hardly seen."""
_BLOCK = 128
"""Columns after which the rest of the weight is corrected, where the groups do not say it."""


def gptq(w: np.ndarray, moments: np.ndarray, form: Format) -> QuantizedArray:
    """Rounds column after column; those that are left take up the error of those that are done.

    Args:
      w: [N, K], any float type, which the scales have too.
      moments: float32 [K, K], the sum of x x^T over the inputs x seen.
      form: the format; its group size divides K.

    Returns:
      The quantized weight, on the default device.
    """
    rows, columns = w.shape
    step = form.group_size or math.gcd(columns, _BLOCK)
    spread = _spread(moments)
    importance = _damped(np.diag(moments))
    rest = w.astype(np.float32)
    values = np.empty((rows, columns), form.dtype)
    ranges: list[tuple[np.ndarray, np.ndarray]] = []
    for start in range(0, columns, step):
        block = slice(start, start + step)
        if form.group_size or not start:
            group = block if form.group_size else slice(None)
            scale, offset = best_ranges(rest[:, None, group], form, w.dtype, importance[group])
            ranges.append((np.asarray(scale)[:, 0], np.asarray(offset)[:, 0]))
        scale, offset = (part.astype(np.float32)[:, 0] for part in ranges[-1])
        errors = np.empty((rows, step), np.float32)
        for i in range(step):
            column = start + i
            nearest = form.nearest((rest[:, column] - offset) / scale)
            values[:, column] = nearest
            errors[:, i] = (rest[:, column] - nearest * scale - offset) / spread[column, column]
            rest[:, column + 1 : block.stop] -= errors[:, i, None] * spread[column, column + 1 : block.stop]
        rest[:, block.stop :] -= errors @ spread[block, block.stop :]
    scales, offsets = (jnp.asarray(np.concatenate(parts, axis=1)) for parts in zip(*ranges, strict=True))
    return QuantizedArray(jnp.asarray(values), scales, form.activations, offsets if form.zero_point else None)


def _spread(moments: np.ndarray) -> np.ndarray:
    """float32 [K, K], upper: row i says how an error in column i spreads over those after it."""
    damped = moments.astype(np.float64)
    np.fill_diagonal(damped, _damped(np.diag(damped)))
    # U with U^T U = H^-1 is the inverse of the upper R with R R^T = H, which is the Cholesky factor read backwards.
    backwards = np.linalg.cholesky(damped[::-1, ::-1])
    return np.linalg.inv(backwards)[::-1, ::-1].astype(np.float32)


def _damped(squares: np.ndarray) -> np.ndarray:
    """The inputs' sums of squares [K], none of them 0."""
    return squares + (_DAMPING * squares.mean() or 1.0)
