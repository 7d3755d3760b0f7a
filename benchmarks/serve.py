"""Requests per second and the times that callers wait, of a server under load; prints Markdown tables.

    python -m benchmarks.serve FOLDER [--model nano] [--clients 16 | --rate 20] [--requests 200] [--max-tokens 64]
        [--ignore-eos] [--serve "--dtype float32 --quantize int8"] [--caches] [--intrude] [--url http://host:port/v1]

FOLDER holds questions: `cases.json` as tests/nano/heldout has it, or pictures, recordings and texts, where files of one
name (`a.png`, `a.wav`, `a.txt`) make one question. They are asked in turn, first one at a time, then by so many clients
at once, or at random moments at a rate per second (Poisson). The answers of both must be equal.

The server is started here, with nothing kept from request to request unless --caches, or is that at --url. Requests
stream, so that every token's time is seen. --intrude also asks a prompt of 2,000 tokens and a picture of 7 crops while
other answers are under way, and shows what these notice.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import io
import itertools
import json
import mimetypes
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.generate import EVERY_CALL_ANEW, machine
from phi4mm_jax.demo import read_cases

Messages = list[dict[str, Any]]


# --- questions -----------------------------------------------------------------------------------------------


def questions(folder: Path) -> list[Messages]:
    """The conversations of a folder, media as data: URLs."""
    if (folder / "cases.json").is_file():
        return [_embedded(case.conversation) for case in read_cases(folder)]
    files = defaultdict(list)
    for file in sorted(folder.iterdir()):
        files[file.stem].append(file)
    found = []
    for group in files.values():
        parts = [part for file in group for part in _parts(file)]
        if parts:
            found.append([{"role": "user", "content": sorted(parts, key=lambda part: part["type"] == "text")}])
    if not found:
        sys.exit(f"{folder}: has no cases.json, pictures, recordings or texts")
    return found


def _parts(file: Path) -> Iterator[dict[str, Any]]:
    if file.suffix == ".txt":
        yield {"type": "text", "text": file.read_text()}
        return
    kind = (mimetypes.guess_type(file.name)[0] or "").partition("/")[0]
    if kind in ("image", "audio"):
        yield {"type": f"{kind}_url", f"{kind}_url": {"url": _data_url(file.read_bytes(), kind)}}


def _embedded(conversation: Sequence[dict[str, Any]]) -> Messages:
    """A conversation whose media are files, with them in it."""
    messages = []
    for message in conversation:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                part
                if part["type"] == "text"
                else {
                    "type": f"{part['type']}_url",
                    f"{part['type']}_url": {"url": _data_url(Path(part[part["type"]]).read_bytes(), part["type"])},
                }
                for part in content
            ]
        messages.append({**message, "content": content})
    return messages


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind}/any;base64,{base64.b64encode(data).decode()}"


# --- asking --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Asked:
    """What became of one question."""

    text: str = ""
    tokens: int = 0
    error: str = ""
    began: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    """When each piece came."""

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [after - before for before, after in itertools.pairwise(self.times)]


async def ask(client: httpx.AsyncClient, messages: Messages, **settings: Any) -> Asked:
    """Asks one question and reads its answer as it comes."""
    asked = Asked(began=time.perf_counter())
    body = {"model": "default", "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", "chat/completions", json=body | {"temperature": 0} | settings) as reply:
            if reply.status_code != 200:
                asked.error = f"{reply.status_code}: {(await reply.aread()).decode()[:200]}"
                return asked
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if usage := chunk.get("usage"):
                    asked.tokens = usage["completion_tokens"]
                if chunk.get("error"):
                    asked.error = chunk["error"]["message"]
                for choice in chunk.get("choices", ()):
                    if content := choice["delta"].get("content"):
                        asked.text += content
                        asked.times.append(time.perf_counter())
    except httpx.HTTPError as error:
        asked.error = repr(error)
    return asked


async def by_clients(client: httpx.AsyncClient, work: Sequence[Messages], count: int, **settings: Any) -> list[Asked]:
    """Asks all, so many at a time."""
    found: list[Asked | None] = [None] * len(work)
    left = iter(enumerate(work))
    with tqdm(total=len(work), desc=f"{count} client(s)", disable=not sys.stderr.isatty()) as bar:

        async def one_client() -> None:
            for i, messages in left:
                found[i] = await ask(client, messages, **settings)
                bar.update()

        await asyncio.gather(*(one_client() for _ in range(count)))
    return found


async def at_rate(client: httpx.AsyncClient, work: Sequence[Messages], rate: float, **settings: Any) -> list[Asked]:
    """Asks all at random moments, so many a second on average."""
    moments = random.Random(0)
    tasks = []
    for messages in work:
        tasks.append(asyncio.create_task(ask(client, messages, **settings)))
        await asyncio.sleep(moments.expovariate(rate))
    return list(await asyncio.gather(*tasks))


async def intruded(client: httpx.AsyncClient, size: Sequence[int]) -> tuple[list[Asked], list[Asked]]:
    """Lets a long prompt and a picture of W x H come while answers are under way; these answers, and the intruders'."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "PNG")
        picture = _data_url(file.getvalue(), "image")
    long = [{"role": "user", "content": await _text_of(client, 2000)}]
    large = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture}}]}]
    # Longer than the short rope range of nano, in which an answer would stop once to be rebuilt.
    running = [[{"role": "user", "content": await _text_of(client, 150 + n)}] for n in range(4)]
    tasks = [asyncio.create_task(ask(client, messages, max_tokens=400, ignore_eos=True)) for messages in running]
    await asyncio.sleep(0.5)
    intruders = [await ask(client, messages, max_tokens=8) for messages in (long, large)]
    return list(await asyncio.gather(*tasks)), intruders


async def _text_of(client: httpx.AsyncClient, tokens: int) -> str:
    """Words of about so many tokens."""
    words = "one two three four " * 32
    reply = await client.post(str(client.base_url).replace("/v1/", "/tokenize"), json={"prompt": words})
    per_token = len(words) / len(reply.json()["tokens"])
    return (words * tokens)[: int(per_token * tokens)]


# --- the server ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(model: str, options: str, caches: bool) -> Iterator[str]:
    """Starts a server; yields its URL once it is warm."""
    command = [sys.executable, "-m", "phi4mm_jax.cli", "serve", "--model", model, "--port", "0", *shlex.split(options)]
    if not caches:
        for name, value in EVERY_CALL_ANEW.items():
            command += ["--set", f"engine.{name}={json.dumps(value)}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        else:
            sys.exit("the server did not start")
        url = found[0]
        while httpx.get(f"{url}/ready").status_code != 200:
            time.sleep(0.2)
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.communicate()


# --- reporting -----------------------------------------------------------------------------------------------

HEAD = (
    "| | requests/s | tokens/s | first token ms: median, p95, p99 | between tokens ms: median, p95, p99 | errors |\n"
    "|---|---|---|---|---|---|"
)


def row(name: str, asked: Sequence[Asked], seconds: float) -> str:
    """A row of the table."""
    firsts = [a.times[0] - a.began for a in asked if a.times]
    gaps = [gap for a in asked for gap in a.gaps]
    cells = [f"{len(asked) / seconds:.2f}", f"{sum(a.tokens for a in asked) / seconds:.1f}", shares(firsts)]
    return f"| {name} | {' | '.join([*cells, shares(gaps), str(sum(bool(a.error) for a in asked))])} |"


def shares(seconds: Sequence[float]) -> str:
    """Median, 95th and 99th percentile in milliseconds."""
    return ", ".join(f"{1000 * np.percentile(seconds, p):.1f}" for p in (50, 95, 99)) if seconds else "-"


async def measure(url: str, args: argparse.Namespace) -> bool:
    """Prints the tables; false if there were errors or answers differ."""
    work = list(itertools.islice(itertools.cycle(questions(args.folder)), args.requests))
    settings = {"max_tokens": args.max_tokens, "ignore_eos": args.ignore_eos}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"{url}/", timeout=None, limits=limits) as client:
        print(f"{machine()}\n\n{args.requests} requests, {args.model}, {args.serve or 'default settings'}\n\n{HEAD}")
        phases = [("one at a time", by_clients(client, work, 1, **settings))]
        if args.rate:
            phases.append((f"{args.rate:g} a second", at_rate(client, work, args.rate, **settings)))
        else:
            phases.append((f"{args.clients} clients", by_clients(client, work, args.clients, **settings)))
        results = []
        for name, phase in phases:
            start = time.perf_counter()
            results.append((await phase, time.perf_counter() - start))
            print(row(name, *results[-1]), flush=True)
        alone, together = (asked for asked, _ in results)
        different = sum(a.text != b.text for a, b in zip(alone, together, strict=True))
        print(f"\n{results[0][1] / results[1][1]:.2f} times the requests per second; {different} answers differ.")
        if args.intrude:
            running, intruders = await intruded(client, [int(n) for n in args.picture.split("x")])
            gaps, firsts = (
                [gap for a in running for gap in a.gaps],
                [a.times[0] - a.began for a in intruders if a.times],
            )
            ratio = np.percentile(gaps, 99) / statistics.median(gaps)
            print(
                f"\nWhile a long prompt and a large picture came: between tokens {shares(gaps)} ms, p99 {ratio:.2f} x"
            )
            print(f"the median; their own first tokens after {shares(firsts)} ms.")
            together += running + intruders
        for asked in alone + together:
            if asked.error:
                print(f"error: {asked.error}", file=sys.stderr)
    return not different and not any(asked.error for asked in alone + together)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--url", help="of a server that is running")
    parser.add_argument("--serve", default="", metavar="OPTIONS", help="more options of `phi4mm serve`")
    parser.add_argument("--caches", action="store_true", help="let the server use what it has computed before")
    parser.add_argument("--requests", type=int, default=200, metavar="N")
    parser.add_argument("--clients", type=int, default=16, metavar="N")
    parser.add_argument("--rate", type=float, metavar="R", help="requests a second, instead of clients")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--ignore-eos", action="store_true", help="answers all have that many tokens")
    parser.add_argument("--picture", default="1344x896", metavar="WxH", help="the large one (%(default)s: 7 crops)")
    parser.add_argument("--intrude", action="store_true", help="then disturb running answers")
    args = parser.parse_args()
    with contextlib.nullcontext(args.url) if args.url else server(args.model, args.serve, args.caches) as url:
        return 0 if asyncio.run(measure(url, args)) else 1


if __name__ == "__main__":
    sys.exit(main())
