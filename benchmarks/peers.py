"""This project beside its peers on the same shapes and threads, taking turns: prefill, and tokens decoded after it.

    python -m benchmarks.peers phi4mm:CKPT phi4mm:CKPT_INT4 torch llama.cpp:MODEL.gguf [--prompt 512] [--threads 1]

Each contestant is loaded in a process of its own and computes while the others wait; a round gives each its turn. Shown
are medians of CPU time (user and system, all threads) and of wall time, and the CPU time in relation to the first
contestant's. All of them have to fit into memory together.

    phi4mm:CKPT[:FORMAT]  a checkpoint, quantized while it is loaded if a format is given
    torch                 the decoder in plain PyTorch bfloat16 (torch_decode.py), random weights, without sampling
    transformers:NATIVE   a checkpoint in transformers' own layout, in bfloat16, without adapters
    llama.cpp:FILE        a GGUF file, such as `python -m tools.random_gguf` writes, through llama-cpp-python
    mistralrs:CKPT:ISQ    a checkpoint, quantized while it is loaded, with the CPU threads that RAYON_NUM_THREADS says
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from benchmarks.generate import EVERY_CALL_ANEW, machine

Call = Callable[[int], None]
"""Reads the prompt into an empty cache and decodes so many tokens; the first comes from the prompt itself."""


def open_phi4mm(checkpoint: str, quantize: str, prompt: int) -> Call:
    """This project."""
    from phi4mm_jax import Phi4MM

    model = Phi4MM.from_pretrained(checkpoint, quantize=quantize or None, progress=False, engine=EVERY_CALL_ANEW)
    return lambda tokens: model.generate(list(range(prompt)), max_tokens=tokens, ignore_eos=True)


def open_torch(_: str, threads: int, prompt: int, tokens: int) -> Call:
    """PyTorch."""
    import torch

    from benchmarks.torch_decode import Decoder
    from phi4mm_jax.config import ModelConfig

    torch.set_num_threads(threads)
    config = ModelConfig.load("phi4mm").text
    decoder = Decoder(config, config.num_layers, prompt + tokens)

    def call(count: int) -> None:
        token = decoder(torch.arange(prompt), 0).argmax()
        for i in range(count - 1):
            token = decoder(token[None], prompt + i).argmax()

    return call


def open_transformers(checkpoint: str, threads: int, prompt: int) -> Call:
    """transformers."""
    import torch
    from transformers import Phi4MultimodalForCausalLM

    torch.set_num_threads(threads)
    model = Phi4MultimodalForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    prompt_ids = torch.arange(prompt)[None]

    def call(count: int) -> None:
        model.generate(input_ids=prompt_ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    return call


def open_llama_cpp(file: str, threads: int, prompt: int, tokens: int) -> Call:
    """llama.cpp."""
    from llama_cpp import Llama

    model = Llama(
        file, n_ctx=prompt + tokens, n_batch=prompt, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def call(count: int) -> None:
        model.reset()
        model.eval(list(range(prompt)))
        for i in range(count - 1):
            model.eval([i])

    return call


def open_mistralrs(checkpoint: str, isq: str, prompt: int) -> Call:
    """mistral.rs; its tokens per prompt are about as many as are asked for."""
    from mistralrs import ChatCompletionRequest, MultimodalArchitecture, Runner, Which

    which = Which.MultimodalPlain(model_id=checkpoint, arch=MultimodalArchitecture.Phi4MM)
    runner = Runner(which=which, in_situ_quant=isq or None)

    def call(count: int) -> None:
        # a new first word each time, so that no earlier prefix is found again
        text = f"{time.monotonic_ns() % 1000} " + "one " * (prompt - 10)
        messages = [{"role": "user", "content": text}]
        runner.send_chat_completion_request(
            ChatCompletionRequest(model="default", messages=messages, max_tokens=count, temperature=0.0)
        )

    return call


def contestant(name: str, args: argparse.Namespace) -> Call:
    """Loads one."""
    kind, _, rest = name.partition(":")
    first, _, second = rest.partition(":")
    if kind == "phi4mm":
        return open_phi4mm(first, second, args.prompt)
    if kind == "torch":
        return open_torch(first, args.threads, args.prompt, args.tokens)
    if kind == "transformers":
        return open_transformers(rest, args.threads, args.prompt)
    if kind == "llama.cpp":
        return open_llama_cpp(rest, args.threads, args.prompt, args.tokens)
    if kind == "mistralrs":
        return open_mistralrs(first, second, args.prompt)
    raise SystemExit(
        f"{name}: expected phi4mm:CKPT[:FORMAT], torch, transformers:NATIVE, llama.cpp:FILE or mistralrs:CKPT[:ISQ]"
    )


def work(name: str, args: argparse.Namespace, pipe: Connection) -> None:
    """A contestant's process: says that it is ready, then measures a call whenever it is told its tokens."""
    call = contestant(name, args)
    call(args.tokens)  # compiles
    call(1)
    pipe.send(None)
    while count := pipe.recv():
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        call(count)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        pipe.send((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall))


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestants", nargs="+", metavar="NAME")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens (%(default)s)")
    parser.add_argument("--tokens", type=int, default=17, metavar="N", help="to decode, 2 or more (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="processors to use (%(default)s)")
    args = parser.parse_args()
    for option, least in {"prompt": 1, "tokens": 2, "rounds": 1, "threads": 1}.items():
        if getattr(args, option) < least:
            parser.error(f"--{option} must be at least {least}")
    # Processes inherit the processors, of which those without an option of their own count their threads.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-args.threads :])
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.threads))
    context = multiprocessing.get_context("spawn")
    pipes = []
    for name in args.contestants:
        pipe, other = context.Pipe()
        context.Process(target=work, args=(name, args, other), daemon=True).start()
        other.close()  # otherwise a process that ends would not end its pipe
        try:
            pipe.recv()
        except EOFError:
            raise SystemExit(f"{name} could not be loaded; its error is above") from None
        pipes.append(pipe)

    costs: list[list[tuple[float, float, float, float]]] = [[] for _ in pipes]
    for _ in range(args.rounds):
        for pipe, taken in zip(pipes, costs, strict=True):
            figures = []
            for count in (1, args.tokens):
                pipe.send(count)
                figures.append(pipe.recv())
            (cpu, wall), (whole_cpu, whole_wall) = figures
            taken.append((cpu, wall, (whole_cpu - cpu) / (args.tokens - 1), (whole_wall - wall) / (args.tokens - 1)))
    for pipe in pipes:
        pipe.send(0)
    print(f"{args.prompt} tokens of prompt, {args.tokens} decoded, {args.threads} threads, {machine()}\n")
    print(
        "| | prefill CPU-s | wall s | relative | CPU-s per token | wall s | relative |\n|---|---|---|---|---|---|---|"
    )
    medians = [[statistics.median(column) for column in zip(*taken, strict=True)] for taken in costs]
    for name, (cpu, wall, token_cpu, token_wall) in zip(args.contestants, medians, strict=True):
        relative = cpu / medians[0][0], token_cpu / medians[0][2]
        print(
            f"| {name} | {cpu:.2f} | {wall:.2f} | {relative[0]:.2f} "
            f"| {token_cpu:.4f} | {token_wall:.4f} | {relative[1]:.2f} |"
        )


if __name__ == "__main__":
    main()
