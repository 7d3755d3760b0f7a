"""Attention of one token of each row over the cache, in each format: time, and bytes of live cache read per second.

    python -m benchmarks.attention [--rows 1 8] [--lengths 512 4096] [--seconds 30] [--implementations xla cpu]

Live keys are also compared with what the device reaches when it copies memory. Formats and backends take turns, call by
call, each over enough layers that none stays in a cache. Other work on the machine then slows all of them alike: the
ratio of medians stands even where the times do not. `taskset -c 0` before it measures one thread.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bandwidth import copy_bandwidth, cycled_bytes, programs, seconds
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.kv import KV, encode

HEADS, KV_HEADS, WIDTH = 24, 8, 128  # of the decoder
POSITIONS = 4096


def layers(dtype: str, rows: int) -> list[tuple[KV, KV]]:
    """Enough random layers of a format that they do not fit a cache, however few keys are live."""
    x = np.random.default_rng(0).standard_normal((rows, KV_HEADS, POSITIONS, WIDTH), np.float32)
    first = (encode(jnp.asarray(x), dtype), encode(jnp.asarray(x[:, :, ::-1]), dtype))
    copies = max(2, cycled_bytes() // sum(a.nbytes for a in jax.tree.leaves(first)))
    return [first, *(jax.tree.map(jnp.copy, first) for _ in range(copies - 1))]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096], help=f"live keys, up to {POSITIONS}")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each number of rows (%(default)s)")
    own = jax.default_backend()
    parser.add_argument("--implementations", nargs="+", default=["xla", own], help="(%(default)s)")
    options = parser.parse_args()
    # A CPU has no arithmetic in bfloat16 to speak of, so it keeps the bits alone.
    dtypes = {"float32": "float32", "bfloat16 bits": "uint16"} if own == "cpu" else {"bfloat16": "bfloat16"}
    dtypes["int8"] = "int8"
    bandwidth = copy_bandwidth()
    device = jax.devices()[0]
    print(f"{device.device_kind}, {platform.machine()}, jax {jax.__version__}, {HEADS} heads, {KV_HEADS} kv heads")
    print(f"Copying memory: {bandwidth / 1e9:.1f} GB/s, read and written\n")
    print("| rows | keys | format | backend | minimum ms | median ms | median / first's | GB/s at best | of a copy |")
    print("|---|---|---|---|---|---|---|---|---|")

    @partial(jax.jit, static_argnames="implementation")
    def attend(q: jax.Array, caches: list[tuple[KV, KV]], lengths: jax.Array, implementation: str) -> list[jax.Array]:
        return [decode_attention(q, k, v, lengths, scale=WIDTH**-0.5, implementation=implementation) for k, v in caches]

    for rows in options.rows:
        q = jnp.asarray(np.random.default_rng(1).standard_normal((rows, HEADS, WIDTH)), jnp.float32)
        caches = {name: programs(layers(dtype, rows)) for name, dtype in dtypes.items()}
        cases = list(itertools.product(options.lengths, dtypes, options.implementations))
        times: dict[tuple[int, str, str], list[float]] = {case: [] for case in cases}
        lengths = {length: jnp.full(rows, length, jnp.int32) for length in options.lengths}
        for length, name, implementation in cases:
            jax.block_until_ready(attend(q, caches[name][0], lengths[length], implementation=implementation))
        end = time.monotonic() + options.seconds
        while time.monotonic() < end:
            for (length, name, implementation), taken in times.items():
                run = partial(attend, implementation=implementation)
                for cache in caches[name]:
                    taken.append(seconds(run, q, cache, lengths[length]) / len(cache))
        for (length, name, implementation), taken in times.items():
            if name == next(iter(dtypes)) and implementation == options.implementations[0]:
                first = statistics.median(taken)
            size = sum(a.nbytes for a in jax.tree.leaves(caches[name][0][0])) * length / POSITIONS
            best, usual = min(taken), statistics.median(taken)
            cells = (rows, length, name, implementation, f"{1000 * best:.3f}", f"{1000 * usual:.3f}")
            rates = f"{size / best / 1e9:.1f} | {size / best / bandwidth:.0%}"
            print(f"| {' | '.join(map(str, cells))} | {usual / first:.2f} | {rates} |", flush=True)


if __name__ == "__main__":
    main()
