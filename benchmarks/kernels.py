"""Products of few rows with weights in each format: time, and bytes of weight read per second.

    python -m benchmarks.kernels [--rows 1 8] [--seconds 30] [--implementation cpu]

Formats take turns, call by call, and each cycles through enough weights that none stays in a cache. The minimum is what
the kernel can do, the median what the machine let it do; the last column compares the minimum with what the device
itself reaches when it copies memory. `taskset -c 0` before it measures one thread.
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

from benchmarks.bandwidth import copy_bandwidth, cycled_bytes, programs, seconds
from pallas_kernels.matmul import matmul
from pallas_kernels.quantized import Format, QuantizedArray
from phi4mm_jax.runtime.memory import bytes_per_device

SHAPE = (16384, 3072)  # the decoder's gate_up projection
FORMATS = {"bfloat16": None, "int8": Format(8), "fp8": Format(8, floating=True), "int8, groups of 128": Format(8, 128)}
FORMATS |= {f"int4, groups of {size}": Format(4, size) for size in (128, 64, 32)}
FORMATS |= {"int4, groups of 64, zero point": Format(4, 64, zero_point=True)}


def weights(form: Format | None) -> list[jax.Array | QuantizedArray]:
    """Enough random weights of a format that they do not fit a cache."""
    rng = np.random.default_rng(0)
    if form is None:
        first = jnp.asarray(rng.standard_normal(SHAPE, np.float32), jnp.bfloat16)
    else:
        low, high = form.limits
        values = jnp.asarray(rng.integers(low, high + 1, SHAPE, np.int16), form.dtype)
        scales = jnp.full((SHAPE[0], SHAPE[1] // (form.group_size or SHAPE[1])), 0.01, jnp.bfloat16)
        first = QuantizedArray(values, scales, offsets=scales if form.zero_point else None)
    count = -(-cycled_bytes() // bytes_per_device(first))
    return [first, *(jax.tree.map(jnp.copy, first) for _ in range(count - 1))]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=30.0, help="for all together (%(default)s)")
    parser.add_argument("--implementation", help="backend of the product; default: the platform's own")
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}, weight {SHAPE[0]} x {SHAPE[1]}")

    bandwidth = copy_bandwidth()
    print(f"Copying memory: {bandwidth / 1e9:.1f} GB/s, read and written\n")

    @jax.jit
    def products(x: jax.Array, ws: list[jax.Array | QuantizedArray]) -> list[jax.Array]:
        return [matmul(x, w, out_dtype=jnp.float32, implementation=options.implementation) for w in ws]

    xs = {
        rows: jnp.asarray(np.random.default_rng(1).standard_normal((rows, SHAPE[1])), jnp.float32)
        for rows in options.rows
    }
    cycles = {name: programs(weights(form)) for name, form in FORMATS.items()}
    times: dict[tuple[str, int], list[float]] = {case: [] for case in itertools.product(FORMATS, options.rows)}
    for name, rows in times:
        jax.block_until_ready(products(xs[rows], cycles[name][0]))
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        for (name, rows), taken in times.items():
            for ws in cycles[name]:
                taken.append(seconds(products, xs[rows], ws) / len(ws))
    print("| format | rows | minimum ms | median ms | GB/s at the minimum | of a copy |\n|---|---|---|---|---|---|")
    for (name, rows), taken in times.items():
        best, usual = 1000 * min(taken), 1000 * statistics.median(taken)
        rate = bytes_per_device(cycles[name][0][0]) / min(taken)
        print(f"| {name} | {rows} | {best:.3f} | {usual:.3f} | {rate / 1e9:.1f} | {rate / bandwidth:.0%} |")


if __name__ == "__main__":
    main()
