"""`matmul` on a TPU for a weight with several scales per row: few rows take the time of reading its integers once.

XLA does other weights as well. Such a one it dequantizes first, in memory, which moves eight times the bytes of int4.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.matmul import reference
from pallas_kernels.quantized import QuantizedArray

LANES = 128
# Of a weight, read by one step of the grid: enough to hide what a step costs besides (0.35 us by Pallas' own guide),
# little enough that the first read, which no work of the kernel overlaps, stays a small part of a product.
_STEP_BYTES = 1 << 20
_MAX_BLOCK_ROWS = 256
# Rows of a pass through the matrix unit that several groups share; with more it costs less to scale the weight.
_MAX_SHARED_ROWS = 256
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

    There is no derivative. XLA does not partition the call: over several devices see `partition`.

    Scales multiply float32 sums over their groups, so that nothing is rounded; with many rows and narrow groups they
    multiply the weight, which is then rounded to the type that it stands for, as in XLA.

    Args:
      x: as there.
      w: as there.
      out_dtype: as there.
      interpret: run without a TPU, see `pl.pallas_call`.

    Raises:
      NotImplementedError: a weight that XLA does as well, sizes or types that fit no tile, or many rows of integers
        with narrow groups.
    """
    if not isinstance(w, QuantizedArray) or w.scales.shape[1] == 1:
        # There, a conversion to x's type is all that stands before XLA's product, and it fuses that.
        raise NotImplementedError("matmul on a TPU: several scales per row; XLA is as good for other weights")
    rows, columns = math.prod(x.shape[:-1]), w.shape[1]
    _check(rows, w)
    if w.activations == "int8":
        groups, scales = reference.round_groups(x.reshape(rows, columns), w.scales.shape[1])
        factors = groups.reshape(rows, columns), scales
    else:
        factors = (x.reshape(rows, columns).astype(w.dtype),)
    # Mosaic lays an array of fewer rows than a tile out in its own way, which it cannot stack.
    missing = -rows % _tile_rows(factors[0].dtype)
    whole, *x_scales = (jnp.pad(factor, ((0, missing), (0, 0))) for factor in factors)
    product = _Product(
        rows=rows + missing,
        out_features=w.shape[0],
        columns=columns,
        groups=w.scales.shape[1],
        x=whole.dtype,
        values=w.values.dtype,
        scales=w.dtype,
        out=jnp.dtype(out_dtype),
    )
    # XLA holds an array of fewer than 128 columns the other way round: transposing that copies nothing.
    y = _call(product, _vmem_limit(), interpret)(whole, w.values, w.scales.T, *x_scales)
    return y[:rows].reshape(*x.shape[:-1], w.shape[0])


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
    if w.activations == "int8" and size < LANES and rows > _MAX_BLOCK_ROWS:
        raise NotImplementedError(f"matmul on a TPU: few rows of integers with groups of {size} columns, not {rows}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Product:
    """Sizes and types of x [M, K] @ w [N, K].T with G groups of columns."""

    rows: int  # M, whole tiles
    out_features: int  # N
    columns: int  # K
    groups: int  # G
    x: jnp.dtype  # of w's scales, or int8
    values: jnp.dtype
    scales: jnp.dtype
    out: jnp.dtype

    @property
    def bits(self) -> int:
        """Of a value of w."""
        return jnp.iinfo(self.values).bits

    @property
    def together(self) -> int:
        """Groups that share a pass through the matrix unit, which contracts 128 columns."""
        return max(1, LANES * self.groups // self.columns)

    @property
    def scales_weight(self) -> bool:
        """Whether scales multiply the weight, rather than the sums over their groups."""
        return self.x != jnp.int8 and self.together > 1 and self.rows * self.together > _MAX_SHARED_ROWS

    def held(self, m: int, n: int) -> int:
        """Bytes of VMEM that a step with blocks of m rows of x and n of w takes."""
        pipelined = m * self.columns * self.x.itemsize + n * self.columns * self.bits // 8
        pipelined += self.groups * n * self.scales.itemsize + m * n * self.out.itemsize
        if self.x == jnp.int8:
            pipelined += m * max(self.groups, LANES) * 4
        sums = 4 * m * n * (1 if self.scales_weight else self.together)
        turned = 4 * n * max(self.groups, LANES) if self.scales_weight else 0
        return 2 * pipelined + 4 * m * n + sums + turned + n * LANES * (8 + self.x.itemsize)

    def blocks(self, limit: int) -> tuple[int, int]:
        """Rows of x and of w in a block: many, halved until a step reads little enough and fits into `limit` bytes.

        Raises:
          NotImplementedError: the smallest do not fit.
        """
        m, n = min(_MAX_BLOCK_ROWS, pl.next_power_of_2(self.rows)), 16 * LANES
        while n > LANES and (n // 2 >= self.out_features or n * self.columns * self.bits > 8 * _STEP_BYTES):
            n //= 2
        while self.held(m, n) > limit:
            if m > _tile_rows(self.x):
                m //= 2
            elif n > LANES:
                n //= 2
            else:
                raise NotImplementedError(f"matmul on a TPU: {self.held(m, n)} bytes of VMEM, more than {limit}")
        return m, n


@functools.cache  # or a model would trace and lower the same kernel anew for each of its layers
def _call(product: _Product, limit: int, interpret: bool | pltpu.InterpretParams) -> Callable[..., jax.Array]:
    """The kernel for x [M, K], w's values [N, K] and scales [G, N], and x's scales [M, G] if it is int8 -> [M, N].

    The grid is (blocks of rows of x, blocks of rows of w). A step holds x [m, K], w's values [n, K] and scales [G, n],
    and the result [m, n], each twice, so that the next ones arrive meanwhile; besides, the total [m, n] and what one
    pass through the matrix unit needs. `_Product.held` counts the bytes: 2.5 MiB of VMEM for 8 rows and gate_up in int4
    with groups of 64. Columns are not cut: what a step reads then lies together, no sum outlives its step, and steps
    may run in any order. Rows of w are the inner loop: x is read once, and w once for each block of x's rows, of which
    decoding has one.
    """
    m, n = product.blocks(limit)
    in_specs = [
        pl.BlockSpec((m, product.columns), lambda i, j: (i, 0)),
        pl.BlockSpec((n, product.columns), lambda i, j: (j, 0)),
        pl.BlockSpec((product.groups, n), lambda i, j: (0, j)),
    ]
    if product.x == jnp.int8:
        in_specs.append(pl.BlockSpec((m, product.groups), lambda i, j: (i, 0)))
    size = product.rows * product.columns, product.out_features * product.columns
    moved = size[0] * product.x.itemsize + size[1] * product.bits // 8
    moved += product.out_features * (product.groups * product.scales.itemsize + product.rows * product.out.itemsize)
    return pl.pallas_call(
        functools.partial(_kernel, product),
        out_shape=jax.ShapeDtypeStruct((product.rows, product.out_features), product.out),
        # The last blocks may reach beyond: neither rows nor outputs mix, and what lies outside is not written.
        grid=(pl.cdiv(product.rows, m), pl.cdiv(product.out_features, n)),
        in_specs=in_specs,
        out_specs=pl.BlockSpec((m, n), lambda i, j: (i, j)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=limit),
        cost_estimate=pl.CostEstimate(flops=2 * product.rows * size[1], bytes_accessed=moved, transcendentals=0),
        name=f"matmul_{product.values}_{m}x{n}x{product.columns}",
        interpret=interpret,
    )


def _kernel(product: _Product, *refs: jax.Array) -> None:
    """One step: x [m, K], values [n, K], scales [G, n] and perhaps x's scales [m, G] -> [m, n]."""
    x_ref, values_ref, scales_ref, *x_scales_refs, out_ref = refs
    rows, together = x_ref.shape[0], product.together
    size = product.columns // product.groups
    turned = scales_ref[...].astype(jnp.float32).T if product.scales_weight else None  # [n, G]
    total = jnp.zeros(out_ref.shape, jnp.float32)
    for first in range(0, product.groups, together):
        x = x_ref[:, first * size : (first + together) * size]
        values = values_ref[:, first * size : (first + together) * size]
        if turned is not None:
            scales = _spread(turned[:, first : first + together], values.shape[1])
            total += _dot(x, (values.astype(jnp.float32) * scales).astype(x.dtype))
            continue
        sums = _dot(_block_diagonal(x, together), values.astype(x.dtype)).astype(jnp.float32)
        for i in range(together):
            group = slice(first + i, first + i + 1)
            part = sums[i * rows : (i + 1) * rows]
            for ref in x_scales_refs:
                part *= ref[:, group]
            total += part * scales_ref[group].astype(jnp.float32)
    out_ref[...] = total.astype(out_ref.dtype)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [m, k] @ w [n, k].T in int32 or float32."""
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=sums)


def _block_diagonal(x: jax.Array, count: int) -> jax.Array:
    """x [m, count * size] -> [count * m, count * size], of which the i-th m rows keep the i-th group of columns.

    So one product gives the sums of each group by itself.
    """
    if count == 1:
        return x
    group = lax.broadcasted_iota(jnp.int32, x.shape, 1) // (x.shape[1] // count)
    return jnp.concatenate([jnp.where(group == i, x, jnp.zeros_like(x)) for i in range(count)])


def _spread(scales: jax.Array, columns: int) -> jax.Array:
    """Scales [n, G] -> [n, columns], each over the columns of its group."""
    rows, count = scales.shape
    group = lax.broadcasted_iota(jnp.int32, (rows, columns), 1) // (columns // count)
    spread = jnp.broadcast_to(scales[:, :1], (rows, columns))
    for i in range(1, count):
        spread = jnp.where(group == i, scales[:, i : i + 1], spread)
    return spread


def _tile_rows(dtype: jnp.dtype) -> int:
    """Rows of a tile in VMEM."""
    return 32 // dtype.itemsize


def _vmem_limit() -> int:
    """Bytes of VMEM that a call may hold: a quarter, which leaves XLA room for what it fetches ahead."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes // 4
    except ValueError:  # no TPU
        return _LEAST_VMEM_BYTES
