"""Products of few rows with weights in each format: time, and bytes of weight read per second.

    python benchmarks/kernels.py [--rows 1 8] [--seconds 30] [--implementation cpu]

Formats take turns, call by call, and each cycles through enough weights that none stays in a cache. The minimum is what
the kernel can do, the median what the machine let it do. `taskset -c 0` before it measures one thread.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul import matmul
from pallas_kernels.quantized import Format, QuantizedArray

SHAPE = (16384, 3072)  # the decoder's gate_up projection
CYCLED_BYTES = 150_000_000
FORMATS = {"bfloat16": None, "int8": Format(8), "fp8": Format(8, floating=True), "int8, groups of 128": Format(8, 128)}
FORMATS |= {f"int4, groups of {size}": Format(4, size) for size in (128, 64, 32)}
FORMATS |= {"int4, groups of 64, zero point": Format(4, 64, zero_point=True)}


def weight_bytes(form: Format | None) -> int:
    """Bytes of a weight."""
    if form is None:
        return 2 * SHAPE[0] * SHAPE[1]
    groups = SHAPE[1] // (form.group_size or SHAPE[1])
    return SHAPE[0] * (SHAPE[1] * form.bits // 8 + 2 * groups * (2 if form.zero_point else 1))


def weights(form: Format | None) -> list[jax.Array | QuantizedArray]:
    """Enough random weights of a format that they do not fit a cache."""
    rng = np.random.default_rng(0)
    count = -(-CYCLED_BYTES // weight_bytes(form))
    if form is None:
        return [jnp.asarray(rng.standard_normal(SHAPE, np.float32), jnp.bfloat16) for _ in range(count)]
    low, high = form.limits
    scales = jnp.full((SHAPE[0], SHAPE[1] // (form.group_size or SHAPE[1])), 0.01, jnp.bfloat16)
    return [
        QuantizedArray(
            jnp.asarray(rng.integers(low, high + 1, SHAPE, np.int16), form.dtype),
            scales,
            offsets=scales if form.zero_point else None,
        )
        for _ in range(count)
    ]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=30.0, help="for all together (%(default)s)")
    parser.add_argument("--implementation", help="backend of the product; default: the platform's own")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}, weight {SHAPE[0]} x {SHAPE[1]}")

    product = jax.jit(lambda x, w: matmul(x, w, out_dtype=jnp.float32, implementation=options.implementation))
    xs = {
        rows: jnp.asarray(np.random.default_rng(1).standard_normal((rows, SHAPE[1])), jnp.float32)
        for rows in options.rows
    }
    cycles = {name: weights(form) for name, form in FORMATS.items()}
    times: dict[tuple[str, int], list[float]] = {case: [] for case in itertools.product(FORMATS, options.rows)}
    for name, rows in times:
        product(xs[rows], cycles[name][0]).block_until_ready()
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        for (name, rows), taken in times.items():
            for w in cycles[name]:
                start = time.perf_counter()
                product(xs[rows], w).block_until_ready()
                taken.append(time.perf_counter() - start)
    print("| format | rows | minimum ms | median ms | GB/s at the minimum |\n|---|---|---|---|---|")
    for (name, rows), taken in times.items():
        best, usual = 1000 * min(taken), 1000 * statistics.median(taken)
        print(f"| {name} | {rows} | {best:.2f} | {usual:.2f} | {weight_bytes(FORMATS[name]) / min(taken) / 1e9:.1f} |")


if __name__ == "__main__":
    main()
