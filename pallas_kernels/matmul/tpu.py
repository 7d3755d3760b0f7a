"""`matmul` on a TPU for a weight with several scales per row: the time of reading its integers once.

XLA does the other weights as well. Groups of columns it dequantizes first, in memory, which moves eight times the bytes
of an int4 weight.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.matmul import reference
from pallas_kernels.quantized import QuantizedArray

LANES = 128
# Of a weight, read by one step of the grid: enough to hide what a step costs besides (about 0.35 us), little enough
# that the first read of a product, which nothing overlaps, stays a small part of it.
_STEP_BYTES = 1 << 20
_MAX_BLOCK_ROWS = 256
# Rows of a pass through the matrix unit, with groups narrower than a pass; beyond, XLA's way is the faster one.
_MAX_PASS_ROWS = 512
# Of VMEM, where the chip does not say: no chip gives a kernel less.
_LEAST_VMEM_BYTES = 16 << 20


def matmul(
    x: jax.Array,  # [..., K]
    w: jax.Array | QuantizedArray,  # [N, K]
    *,
    out_dtype: jax.typing.DTypeLike,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """See `api.matmul`.

    There is no derivative. XLA does not partition the call: a program over several devices chooses other backends, see
    `dispatch.prefer`, or calls it within `jax.shard_map`; otherwise it does not compile.

    The scales multiply float32 sums over their groups, so the weight is never rounded to the type that it stands for.

    Args:
      x: as there.
      w: as there.
      out_dtype: as there.
      interpret: run without a TPU, see `pl.pallas_call`.

    Raises:
      NotImplementedError: a weight that XLA does as well, a group size or a number of columns that fits no tile, or so
        many rows that XLA is the faster.
    """
    if not isinstance(w, QuantizedArray) or w.scales.shape[1] == 1:
        # A conversion to x's type is all that stands before XLA's product, and it fuses that.
        raise NotImplementedError("matmul on a TPU: several scales per row; XLA is as good for other weights")
    rows, (out_features, columns), groups = math.prod(x.shape[:-1]), w.shape, w.scales.shape[1]
    _check(rows, w)
    if w.activations == "int8":
        rounded, x_scales = reference.round_groups(x.reshape(rows, columns), groups)
        activations = (rounded.reshape(rows, columns), x_scales)
    else:
        activations = (x.reshape(rows, columns).astype(w.dtype),)
    y = _product(*activations, w=w, out_dtype=jnp.dtype(out_dtype), interpret=interpret)
    return y.reshape(*x.shape[:-1], out_features)


def _check(rows: int, w: QuantizedArray) -> None:
    """Raises NotImplementedError where the kernel cannot do it."""
    columns, groups = w.shape[1], w.scales.shape[1]
    size = columns // max(1, groups)
    if 0 in (rows, *w.shape):
        raise NotImplementedError(f"matmul on a TPU: rows and a weight, not {rows} and {w.shape}")
    if w.values.dtype not in (jnp.int8, jnp.int4) or w.dtype not in (jnp.bfloat16, jnp.float32):
        types = f"{w.values.dtype} and {w.dtype}"
        raise NotImplementedError(f"matmul on a TPU: int8 or int4 and bfloat16 or float32 scales, not {types}")
    if columns % LANES or size * groups != columns or (size not in (32, 64) and size % LANES):
        raise NotImplementedError(
            f"matmul on a TPU: groups of 32, 64 or a multiple of {LANES} columns and a multiple of {LANES} in all, "
            f"not {columns} / {groups}"
        )
    if size < LANES and rows * LANES // size > _MAX_PASS_ROWS:
        raise NotImplementedError(f"matmul on a TPU: few rows with groups of {size} columns, not {rows}")


def _product(
    x: jax.Array,  # [M, K] of w's type, or int8
    x_scales: jax.Array | None = None,  # [M, G] float32, if x is int8
    *,
    w: QuantizedArray,  # [N, K]
    out_dtype: jnp.dtype,
    interpret: bool | pltpu.InterpretParams,
) -> jax.Array:  # [M, N]
    """One call of the kernel.

    The grid is (blocks of rows of x, blocks of rows of w). A step holds x [bm, K], w's values [bn, K] and scales
    [G, bn], and the result [bm, bn], each twice, so that the next ones arrive meanwhile; besides them the sums of one
    pass and their total. Columns are not cut: what a step reads then lies together, no sum outlives its step, and all
    steps may run in any order. Rows of w are the inner loop: x is read once, and w once for each block of x's rows, of
    which decoding has one.
    """
    (rows, columns), (out_features, groups) = x.shape, w.scales.shape
    limit = _vmem_limit()
    block_rows, block_columns = _blocks(x, w, out_dtype, limit)
    moved = (x.size * x.dtype.itemsize, w.values.size * _bits(w) // 8, w.scales.size * w.dtype.itemsize)
    operands = [x, w.values, w.scales.T]  # XLA holds so narrow an array the other way round: this copies nothing
    in_specs = [
        pl.BlockSpec((block_rows, columns), lambda i, j: (i, 0)),
        pl.BlockSpec((block_columns, columns), lambda i, j: (j, 0)),
        pl.BlockSpec((groups, block_columns), lambda i, j: (0, j)),
    ]
    if x_scales is not None:
        operands.append(x_scales)
        in_specs.append(pl.BlockSpec((block_rows, groups), lambda i, j: (i, 0)))
    return pl.pallas_call(
        functools.partial(_kernel, group_size=columns // groups),
        out_shape=jax.ShapeDtypeStruct((rows, out_features), out_dtype),
        # Blocks at the end may reach beyond: rows and outputs do not mix, and what lies outside is not written.
        grid=(pl.cdiv(rows, block_rows), pl.cdiv(out_features, block_columns)),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((block_rows, block_columns), lambda i, j: (i, j)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=limit,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * out_features * columns,
            bytes_accessed=sum(moved) + rows * out_features * out_dtype.itemsize,
            transcendentals=0,
        ),
        name=f"matmul_{w.values.dtype}_{block_rows}x{block_columns}x{columns}",
        interpret=interpret,
    )(*operands)


def _kernel(*refs: jax.Array, group_size: int) -> None:
    """One block: x [bm, K], values [bn, K], scales [G, bn] and perhaps x's scales [bm, G] -> [bm, bn]."""
    x_ref, values_ref, scales_ref, *x_scales_refs, out_ref = refs
    rows, columns = x_ref.shape
    together = max(1, LANES // group_size)
    total = jnp.zeros(out_ref.shape, jnp.float32)
    for first in range(0, columns // group_size, together):
        part = slice(first * group_size, (first + together) * group_size)
        x = _block_diagonal(x_ref[:, part], together)
        sums = lax.dot_general(
            x,
            values_ref[:, part].astype(x.dtype),
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32 if x.dtype == jnp.int8 else jnp.float32,
        ).astype(jnp.float32)
        for i in range(together):
            group = slice(first + i, first + i + 1)
            scaled = sums[i * rows : (i + 1) * rows]
            for ref in x_scales_refs:
                scaled = scaled * ref[:, group]
            total += scaled * scales_ref[group].astype(jnp.float32)
    out_ref[...] = total.astype(out_ref.dtype)


def _block_diagonal(x: jax.Array, count: int) -> jax.Array:
    """x [M, count * size] -> [count * M, count * size]: the i-th M rows keep the i-th group of columns.

    A pass through the matrix unit contracts 128 columns; so one gives the sums of all the groups that share them.
    """
    if count == 1:
        return x
    group = lax.broadcasted_iota(jnp.int32, x.shape, 1) // (x.shape[1] // count)
    return jnp.concatenate([jnp.where(group == i, x, jnp.zeros_like(x)) for i in range(count)])


def _blocks(x: jax.Array, w: QuantizedArray, out_dtype: jnp.dtype, limit: int) -> tuple[int, int]:
    """Rows of x and of w in a block: large ones, halved until a step reads little enough and fits.

    Raises:
      NotImplementedError: the smallest do not fit.
    """
    rows, columns = x.shape
    groups = w.scales.shape[1]
    together = max(1, LANES * groups // columns)
    least = 32 // x.dtype.itemsize  # a tile's rows

    def held(m: int, n: int) -> int:
        pipelined = m * columns * x.dtype.itemsize + n * columns * _bits(w) // 8
        pipelined += groups * n * w.dtype.itemsize + m * n * out_dtype.itemsize + 4 * m * max(groups, LANES)
        return 2 * pipelined + 4 * m * n * (together + 1) + n * LANES * together * (4 + x.dtype.itemsize)

    m = min(_MAX_BLOCK_ROWS, max(least, pl.next_power_of_2(rows)))
    n = 16 * LANES
    while n > LANES and (n // 2 >= w.shape[0] or n * columns * _bits(w) > 8 * _STEP_BYTES):
        n //= 2
    while held(m, n) > limit:
        if m > least:
            m //= 2
        elif n > LANES:
            n //= 2
        else:
            raise NotImplementedError(f"matmul on a TPU: {held(m, n)} bytes of VMEM, more than {limit}")
    return m, n


def _bits(w: QuantizedArray) -> int:
    return jnp.iinfo(w.values.dtype).bits


def _vmem_limit() -> int:
    """Bytes of VMEM that a call may hold: a quarter, which leaves XLA room for what it fetches ahead."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes // 4
    except ValueError:  # no TPU
        return _LEAST_VMEM_BYTES
