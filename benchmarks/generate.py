"""How long loading, encoding, prefill and decoding take, and how much memory; prints a Markdown table.

    python -m benchmarks.generate CKPT... [--config cpu ...] [--quantize int8 ...] [--rows 8] [--max-tokens 32]
        [--cases text_256,image_448,image_1344x896,audio_10s] [--repeat 3] [--set K=V ...]

Every checkpoint, config and format runs in a process of its own, so that its peak memory is its own. Figures are
medians of `--repeat` calls after one that compiles. Beside wall time stands CPU time (user + system, all threads),
which other work on the machine disturbs less. Inputs are made up here: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import multiprocessing
import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from phi4mm_jax.config import parse_settings
from phi4mm_jax.evaluation.environment import processor

if TYPE_CHECKING:
    from phi4mm_jax import Phi4MM

DEFAULT_CASES = "text_256,image_448,image_1344x896,audio_10s"
EVERY_CALL_ANEW = {"prefix_cache": False, "media_cache_mib": 0}
"""Settings of section `engine` under which nothing is kept from call to call."""


# --- measuring -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of wall time and of CPU time."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, run: Callable[[], Any]) -> Self:
        """Measures one call."""
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        return cls(time.perf_counter() - wall, time.process_time() - cpu)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.wall - other.wall, self.cpu - other.cpu)

    def __truediv__(self, count: float) -> Cost:
        return Cost(self.wall / count, self.cpu / count)

    def rate(self, count: float) -> str:
        """Returns `count` per second of wall time; a difference of two costs may be lost in noise."""
        return f"{count / self.wall:.3g}" if self.wall > 0 else "noise"


def repeated(run: Callable[[], Any], repeat: int) -> tuple[Cost, Cost]:
    """Returns the medians of `repeat` calls, and what the call before them, which compiles, cost on top."""
    first = Cost.of(run)
    costs = [Cost.of(run) for _ in range(repeat)]
    median = Cost(statistics.median(c.wall for c in costs), statistics.median(c.cpu for c in costs))
    return median, first - median


def peak_memory() -> str:
    """Peak of the process, and of the accelerator where there is one."""
    import jax

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return f"{host / 1e9:.2f} GB" + (f" host, {device / 1e9:.2f} GB device" if device else "")


# --- cases ---------------------------------------------------------------------------------------------------


def picture(width: int, height: int) -> Image.Image:
    """Returns a colour gradient with noise."""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([255 * x / width, 255 * y / height, 127 + 127 * np.sin((x + y) / 40)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 12, base.shape)
    return Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))


def speech(seconds: float, rate: int = 16_000) -> tuple[np.ndarray, int]:
    """Returns harmonics of a wandering pitch that swell and fade four times a second, as syllables do."""
    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * t)) / rate
    voice = sum(np.sin(k * phase) / k for k in range(1, 20))
    noise = np.random.default_rng(0).normal(0, 0.02, t.shape)
    return (0.2 * voice * np.sin(np.pi * 4 * t) ** 2 + noise).astype(np.float32), rate


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of request."""

    name: str
    prompt: Any  # a conversation, or a raw prompt as token ids
    images: int = 0
    audio_seconds: float = 0.0


def make_case(name: str, model: Phi4MM) -> Case:
    """Makes the request that a name such as text_256, image_448, image_1344x896 or audio_10s stands for."""
    if match := re.fullmatch(r"text_(\d+)", name):
        count = int(match[1])
        text = "The quick brown fox jumps over the lazy dog. " * count
        return Case(name, model.processor.tokenizer.encode(text, allow_special=False)[:count])
    if match := re.fullmatch(r"image_(\d+)(?:x(\d+))?", name):
        image = picture(int(match[1]), int(match[2] or match[1]))
        return Case(name, _message({"type": "image", "image": image}, "What is shown?"), images=1)
    if match := re.fullmatch(r"audio_(\d+)s", name):
        clip = {"type": "audio", "audio": speech(int(match[1]))}
        return Case(name, _message(clip, "Transcribe the audio clip into text."), audio_seconds=float(match[1]))
    raise SystemExit(f"unknown case {name!r}: expected text_N, image_N, image_WxH or audio_Ns")


def _message(medium: dict[str, Any], text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [medium, {"type": "text", "text": text}]}]


# --- running -------------------------------------------------------------------------------------------------


def run_case(model: Phi4MM, case: Case, rows: int, max_tokens: int, repeat: int, shortest: float) -> str:
    """Measures one case, asked `rows` times at once, and returns its row of the table.

    A step's share of the bandwidth is the part of its time that copying as many bytes would take: `shortest` seconds.
    """
    import jax

    from phi4mm_jax.runtime.encoding import encode_media

    def encode() -> None:
        """Reads the media and runs their encoders: what comes before the decoder."""
        prompts = [model.processor.conversation(case.prompt)] * rows
        placements = encode_media(model.steps, model.weights, prompts)
        jax.block_until_ready([placement.embeddings for of_a_row in placements for placement in of_a_row])

    def answer(tokens: int) -> Any:
        return model.generate([case.prompt] * rows, max_tokens=tokens, ignore_eos=True)

    has_media = case.images or case.audio_seconds
    media, media_compile = repeated(encode, repeat) if has_media else (Cost(0, 0), Cost(0, 0))
    first_token, compile_prefill = repeated(lambda: answer(1), repeat)
    whole, compile_decode = repeated(lambda: answer(max_tokens), repeat)
    prompt_tokens = sum(out.usage.prompt_tokens for out in answer(1))
    prefill, decode = first_token - media, (whole - first_token) / (max_tokens - 1)
    compiled = media_compile.wall + compile_prefill.wall + compile_decode.wall
    if case.images:
        rate = f"{media.rate(rows * case.images)} images/s"
    else:
        rate = f"{media.wall / (rows * case.audio_seconds):.3g} s per s" if case.audio_seconds else "-"
    cells = [
        case.name,
        f"{prompt_tokens}",
        rate,
        f"{media.cpu:.2f}" if has_media else "-",
        prefill.rate(prompt_tokens),
        f"{prefill.cpu:.2f}",
        decode.rate(rows),
        f"{shortest / decode.wall:.0%}" if decode.wall > 0 else "noise",
        f"{decode.cpu:.3f}",
        f"{first_token.wall:.2f}",
        f"{compiled:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


HEADER = """\
| case | prompt tokens | media | media CPU-s | prefill tokens/s | prefill CPU-s | decode tokens/s | of bandwidth \
| CPU-s per step | first token s | compile s |
|---|---|---|---|---|---|---|---|---|---|---|"""


def run(checkpoint: str, config: str, quantize: str | None, args: argparse.Namespace) -> None:
    """Loads one checkpoint under one config in one format, measures every case and prints the section of a report."""
    import jax

    from benchmarks.bandwidth import copy_bandwidth, step_bytes
    from phi4mm_jax import Phi4MM

    loaded: list[Phi4MM] = []
    sections = parse_settings(args.set)
    sections["engine"] = EVERY_CALL_ANEW | sections.get("engine", {})
    options = {"config": config, "quantize": quantize, "progress": False, **sections}
    load = Cost.of(lambda: loaded.append(Phi4MM.from_pretrained(checkpoint, **options)))
    (model,) = loaded
    settings = "".join(f", {setting}" for setting in [*([quantize] if quantize else []), *args.set])
    print(f"### {os.path.basename(os.path.normpath(checkpoint))}, config {config}{settings}\n")
    loading = f"Loading: {load.wall:.1f} s, {load.cpu:.1f} CPU-s, peak memory {peak_memory()}"
    size, bandwidth = step_bytes(model.steps.unpack(model.weights)), copy_bandwidth()
    memory = (
        f"A device copies {bandwidth / 1e9:.1f} GB/s, read and written, and holds {size / 1e9:.2f} GB of the decoder"
    )
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}. {loading}. {memory}.\n\n{HEADER}", flush=True)
    for name in args.cases.split(","):
        case, measured = make_case(name, model), (args.rows, args.max_tokens, args.repeat)
        print(run_case(model, case, *measured, size / bandwidth), flush=True)
    print(f"\nPeak memory of the whole run: {peak_memory()}.\n", flush=True)


def machine() -> str:
    """Describes the machine and the versions."""
    import jax
    import jaxlib

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = f"Python {platform.python_version()}, jax {jax.__version__}, jaxlib {jaxlib.__version__}"
    tunables = os.environ.get("GLIBC_TUNABLES", "unset")
    return f"{datetime.date.today()}, {processor()}, {cores} cores; {versions}; GLIBC_TUNABLES {tunables}."


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the arguments and runs every combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="directory or hub id")
    parser.add_argument("--config", nargs="+", default=["auto"], metavar="P", help="presets or TOML files")
    parser.add_argument("--quantize", nargs="+", default=[None], metavar="FORMAT", help="formats to load in")
    parser.add_argument("--cases", default=DEFAULT_CASES, help="comma-separated (%(default)s)")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="how often each request is made at once")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help="tokens to decode, 2 or more")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="measured calls per figure")
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="change a setting")
    args = parser.parse_args(argv)
    if args.max_tokens < 2 or args.repeat < 1:
        parser.error("--max-tokens must be at least 2 and --repeat at least 1")
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # compile times are those of a first run
    print(f"`python {' '.join(sys.orig_argv[1:])}`\n\n{machine()}\n", flush=True)
    for case in itertools.product(args.checkpoints, args.config, args.quantize):
        process = multiprocessing.get_context("spawn").Process(target=run, args=(*case, args))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
