"""`matmul` on a Hopper GPU for a weight with several scales per row: few rows take the time of reading it once.

XLA does other weights as well. Such a one it dequantizes first, in memory, which moves nine times the bytes of int4.
The kernel compiles for such a GPU, is right when interpreted, and has not been timed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.matmul import reference
from pallas_kernels.quantized import QuantizedArray

_MAX_ROWS = 32  # with more, registers spill
_STEP_GROUPS = 8  # whose scales, of one row, are 16 bytes: the least that is copied at once
_MAX_STAGES = 4
_CHUNK_BITS = 1024  # of a row of the weight that are in registers at once


def matmul(
    x: jax.Array,  # [..., K]
    w: jax.Array | QuantizedArray,  # [N, K]
    *,
    out_dtype: jax.typing.DTypeLike,
    interpret: Any = None,
) -> jax.Array:
    """See `api.matmul`.

    Scales multiply float32 sums over their groups, so that nothing is rounded. There is no derivative. XLA does not
    partition the call: a program over several devices chooses other backends, see `dispatch.prefer`.

    Args:
      x: as there.
      w: as there.
      out_dtype: as there.
      interpret: run without a GPU, see `plgpu.kernel`.

    Raises:
      NotImplementedError: another device, a weight that XLA does as well, sizes or types that fit no tile, or many
        rows.
    """
    if not isinstance(w, QuantizedArray) or w.scales.shape[1] == 1 or w.activations != "float":
        # There, a conversion of the weight is all that stands before XLA's product, and it fuses that.
        raise NotImplementedError("matmul on a GPU: several scales per row and float activations; else XLA is as good")
    rows = math.prod(x.shape[:-1])
    product = sizes(rows, w)
    if not interpret:
        hopper.require("matmul", is_right)
    y = _multiply(product, x.reshape(rows, -1), w, interpret)
    return y.astype(out_dtype).reshape(*x.shape[:-1], w.shape[0])


@functools.cache
def is_right(interpret: Any = None) -> bool:
    """Whether the kernel does int4 and int8 with split columns rightly on this GPU, see `hopper.prove`."""

    def cases() -> bool:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (5, 2048), jnp.bfloat16)
        scales = jax.random.uniform(keys[1], (64, 32), jnp.bfloat16, 0.001, 0.01)
        values = jax.random.randint(keys[2], (64, 2048), -8, 8)
        weights = [QuantizedArray(values.astype(dtype), scales) for dtype in (jnp.int4, jnp.int8)]
        expected = reference.matmul(x, weights[0], out_dtype=jnp.float32)
        return all(hopper.close(_multiply(sizes(5, w), x, w, interpret), expected) for w in weights)

    return hopper.prove("matmul", cases)


def _multiply(product: "Product", x: jax.Array, w: QuantizedArray, interpret: Any) -> jax.Array:
    """x [rows, K] @ w [N, K].T in float32."""
    whole = jnp.pad(x.astype(w.dtype), ((0, product.rows - len(x)), (0, 0)))
    return _call(product, interpret)(whole, w.values, w.scales).sum(axis=0).T[: len(x)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """Sizes and types of x [M, K] @ w [N, K].T with G groups of columns."""

    rows: int  # M, a multiple of 8
    out_features: int  # N
    columns: int  # K
    groups: int  # G
    values: jnp.dtype

    @property
    def size(self) -> int:
        """Columns of a group."""
        return self.columns // self.groups

    @property
    def steps(self) -> int:
        """Through all columns."""
        return self.groups // _STEP_GROUPS

    @property
    def splits(self) -> int:
        """Parts of the columns, each for blocks of its own: as many as keep the GPU busy and divide the steps."""
        most = max(1, hopper.BLOCKS * hopper.ROWS // self.out_features)
        return max(count for count in range(1, self.steps + 1) if self.steps % count == 0 and count <= most)

    @property
    def step_bytes(self) -> int:
        """Of shared memory for the operands of a step."""
        of_a_column = hopper.ROWS * hopper.bits_of(self.values) // 8 + self.rows * 2
        return _STEP_GROUPS * (self.size * of_a_column + hopper.ROWS * 2)

    @property
    def kept_bytes(self) -> int:
        """Of shared memory for the result and for barriers."""
        return 4 * hopper.ROWS * self.rows + 1024

    @property
    def stages(self) -> int:
        """Steps whose operands are in shared memory, of two blocks or else of one; 1 if no two fit there."""
        fitting = [(hopper.SHARED_BYTES // blocks - self.kept_bytes) // self.step_bytes for blocks in (2, 1)]
        return min(_MAX_STAGES, next((count for count in fitting if count > 1), 1))


def sizes(rows: int, w: QuantizedArray) -> Product:
    """Raises NotImplementedError where the kernel cannot do it."""
    out_features, columns = w.shape
    groups = w.scales.shape[1]
    if w.values.dtype not in (jnp.int8, jnp.int4) or w.dtype != jnp.bfloat16:
        types = f"{w.values.dtype} and {w.dtype}"
        raise NotImplementedError(f"matmul on a GPU: int8 or int4 and bfloat16 scales, not {types}")
    if not 1 <= rows <= _MAX_ROWS or not out_features or out_features % hopper.ROWS:
        raise NotImplementedError(
            f"matmul on a GPU: 1 to {_MAX_ROWS} rows and a multiple of {hopper.ROWS} outputs, "
            f"not {rows} and {out_features}"
        )
    if columns not in (32 * groups, 64 * groups, 128 * groups) or groups % _STEP_GROUPS:
        raise NotImplementedError(
            f"matmul on a GPU: a multiple of {_STEP_GROUPS} groups of 32, 64 or 128 columns, not {columns} / {groups}"
        )
    product = Product(
        rows=-(-rows // 8) * 8, out_features=out_features, columns=columns, groups=groups, values=w.values.dtype
    )
    if product.stages < 2:
        raise NotImplementedError(f"matmul on a GPU: fewer rows than {rows} with groups of {product.size} columns")
    return product


@functools.cache  # or a model would trace and lower the same kernel anew for each of its layers
def _call(product: Product, interpret: Any) -> Callable[..., jax.Array]:
    """The kernel for x [M, K], w's values [N, K] and scales [N, G] -> float32 [splits, N, M], to be added up.

    The grid is (blocks of 64 rows of w, splits of the columns). A step holds w's values [64, k] and scales [64, 8] and
    x [M, k], k being 8 groups; several steps are under way at once. For each group the weight goes through registers,
    where it becomes bfloat16, as the factor from which the tensor cores take 64 rows; x is their other factor. So their
    8 columns, and not their 64 rows, are what few rows of x leave idle. Both factors lie in memory as they are needed;
    the weight is read once, x by every block, from the second level cache.
    """
    size, rows = product.size, hopper.ROWS
    columns, steps = _STEP_GROUPS * size, product.steps // product.splits
    chunk = max(size, _CHUNK_BITS // hopper.bits_of(product.values))
    tiles = hopper.tiles(size, jnp.bfloat16), hopper.tiles(columns, product.values)

    def kernel(x, values, scales, out, total):
        block, split = lax.axis_index("block"), lax.axis_index("split")
        specs = [
            plgpu.BlockSpec((product.rows, columns), lambda i: (0, split * steps + i), transforms=tiles[0]),
            plgpu.BlockSpec((rows, columns), lambda i: (block, split * steps + i), transforms=tiles[1]),
            plgpu.BlockSpec((rows, _STEP_GROUPS), lambda i: (block, split * steps + i)),
        ]
        sums = plgpu.emit_pipeline(
            functools.partial(_step, size=size, chunk=chunk),
            grid=(steps,),
            in_specs=specs,
            max_concurrent_steps=product.stages,
            init_carry=jnp.zeros((rows, product.rows), jnp.float32),
        )(x, values, scales)
        total[...] = sums
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(total, out.at[split, pl.ds(block * rows, rows)])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((product.splits, product.out_features, product.rows), jnp.float32),
        grid=(product.out_features // rows, product.splits),
        grid_names=("block", "split"),
        scratch_types=[plgpu.SMEM((rows, product.rows), jnp.float32)],
        compiler_params=hopper.PARAMS,
        interpret=interpret,
        kernel_name=f"matmul_{product.values}_{rows}x{product.rows}x{columns}",
    )


def _step(_, x, values, scales, sums: jax.Array, *, size: int, chunk: int) -> jax.Array:
    """x [M, k], values [64, k] and scales [64, 8] in shared memory: adds their product to sums [64, M]."""
    for first in range(0, values.shape[1], chunk):
        loaded = values[:, first : first + chunk]
        for start in range(first, first + chunk, size):
            weight = loaded[:, start - first : start - first + size].astype(x.dtype)
            part = hopper.dot(weight, x.at[:, pl.ds(start, size)], transposed=True)
            sums += part * lax.broadcast_in_dim(scales[:, start // size].astype(jnp.float32), part.shape, (0,))
    return sums
