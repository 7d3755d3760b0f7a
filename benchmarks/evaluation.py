"""Seconds of speech, and pictures, by second of a whole evaluation: this project beside transformers; prints a table.

    python -m benchmarks.evaluation FOLDER phi4mm:CKPT[:FORMAT] transformers:NATIVE [--tokens 32] [--rounds 3]

FOLDER holds recordings, which are transcribed, and pictures, which are described; every answer has so many tokens,
whatever it says. Each contestant is loaded in a process of its own and computes while the others wait, so all must fit
into memory together. The clock covers decoding and transforming media, encoders, prefill and decode, as that of the
Open ASR leaderboard, and not loading and compiling. A first turn is not counted.

transformers runs NATIVE, a checkpoint in its own layout (`python -m tools.random_checkpoint --layout native`), with
the adapter of the modality through PEFT, in bfloat16 and batches of --batch; it is given pictures as this project cuts
them, since its own processor needs torchvision. torch, transformers and peft must be in the same environment.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.generate import EVERY_CALL_ANEW, machine
from phi4mm_jax.processing.audio import load_audio
from phi4mm_jax.processing.media import MediaLimits

TRANSCRIBE, DESCRIBE = "Transcribe the audio clip into text.", "Describe the picture."
SIDE = 896
"""Pictures are brought to this size, which is 2 x 2 crops and the view of the whole."""

Turn = Callable[[str], float]
"""Answers all of "speech" or "pictures"; returns seconds."""


def write_rows(folder: Path, out: Path) -> dict[str, float]:
    """Writes a JSONL of each kind, pictures brought to their size; returns seconds of speech and how many pictures."""
    amounts, rows = {"speech": 0.0, "pictures": 0.0}, {"speech": [], "pictures": []}
    for file in sorted(folder.iterdir()):
        if file.suffix in (".wav", ".flac", ".ogg"):
            samples, rate = load_audio(file, MediaLimits())
            amounts["speech"] += len(samples) / rate
            rows["speech"].append({"audio": str(file.resolve()), "prompt": TRANSCRIBE, "answers": [""]})
        elif file.suffix in (".png", ".jpg", ".webp"):
            picture = out / f"{file.stem}.png"
            Image.open(file).convert("RGB").resize((SIDE, SIDE)).save(picture)
            amounts["pictures"] += 1
            rows["pictures"].append({"image": str(picture), "prompt": DESCRIBE, "answers": [""]})
    for kind, lines in rows.items():
        (out / f"{kind}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return amounts


def open_phi4mm(rest: str, data: Path, args: argparse.Namespace) -> Turn:
    """This project, by `evaluate`."""
    from phi4mm_jax import Phi4MM
    from phi4mm_jax.evaluation.run import evaluate
    from phi4mm_jax.evaluation.tasks.custom import custom

    checkpoint, _, quantize = rest.partition(":")
    engine = {**EVERY_CALL_ANEW, "max_batch": args.batch}
    model = Phi4MM.from_pretrained(checkpoint, quantize=quantize or None, progress=False, engine=engine)

    def turn(kind: str) -> float:
        task = custom(data / f"{kind}.jsonl", metric="exact", max_tokens=args.tokens)
        with tempfile.TemporaryDirectory() as out:
            task = dataclasses.replace(task, ignore_eos=True)
            [results] = evaluate(task, model, out=out, batch=args.batch, progress=False)
        if results.counts.errors:
            raise SystemExit(f"{kind}: {results.counts.errors} items could not be asked")
        return results.speed.seconds

    return turn


def open_transformers(checkpoint: str, data: Path, args: argparse.Namespace) -> Turn:
    """transformers, as its documentation runs this model."""
    import torch
    from transformers import Phi4MultimodalFeatureExtractor, Phi4MultimodalForCausalLM

    from phi4mm_jax.config import ModelConfig
    from phi4mm_jax.processing.processor import Processor

    processor = Processor.from_checkpoint(checkpoint, ModelConfig.from_checkpoint(checkpoint))
    extract = Phi4MultimodalFeatureExtractor()
    model = Phi4MultimodalForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    for adapter in ("speech", "vision"):
        model.load_adapter(f"{checkpoint}/{adapter}-lora", adapter_name=adapter)

    def media(kind: str, rows: Sequence[dict[str, str]]) -> tuple[list[np.ndarray], dict[str, torch.Tensor]]:
        if kind == "speech":
            clips = [load_audio(row["audio"], MediaLimits()) for row in rows]
            prompts = [processor.raw(f"<|user|><|audio_1|>{TRANSCRIBE}<|end|><|assistant|>", audios=[c]) for c in clips]
            from soxr import resample

            samples = [resample(samples, rate, 16000) for samples, rate in clips]
            features = extract(samples, sampling_rate=16000, return_tensors="pt")
            return [prompt.token_ids for prompt in prompts], dict(features)
        prompts = [
            processor.raw(f"<|user|><|image_1|>{DESCRIBE}<|end|><|assistant|>", images=[row["image"]]) for row in rows
        ]
        images = [prompt.images[0] for prompt in prompts]
        return [prompt.token_ids for prompt in prompts], {
            "image_pixel_values": torch.from_numpy(np.stack([image.crops for image in images])).to(torch.bfloat16),
            "image_attention_mask": torch.from_numpy(np.stack([image.mask for image in images])),
            "image_sizes": torch.full((len(images), 2), SIDE),
        }

    @torch.inference_mode()
    def turn(kind: str) -> float:
        model.set_adapter("speech" if kind == "speech" else "vision")
        rows = [json.loads(line) for line in (data / f"{kind}.jsonl").read_text().splitlines()]
        begun = time.perf_counter()
        for start in range(0, len(rows), args.batch):
            prompts, inputs = media(kind, rows[start : start + args.batch])
            longest = max(map(len, prompts))
            ids = np.full((len(prompts), longest), model.config.pad_token_id)
            for row, prompt in zip(ids, prompts, strict=True):
                row[longest - len(prompt) :] = prompt
            mask = np.arange(longest) >= longest - np.array([[len(prompt)] for prompt in prompts])
            answers = model.generate(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask).long(),
                max_new_tokens=args.tokens,
                min_new_tokens=args.tokens,
                do_sample=False,
                **inputs,
            )
            for answer in answers[:, longest:].tolist():
                processor.tokenizer.decode(answer)
        return time.perf_counter() - begun

    return turn


def work(name: str, data: Path, args: argparse.Namespace, pipe: Connection) -> None:
    """A contestant's process."""
    kind, _, rest = name.partition(":")
    turn = {"phi4mm": open_phi4mm, "transformers": open_transformers}[kind](rest, data, args)
    pipe.send(None)
    while what := pipe.recv():
        pipe.send(turn(what))


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("contestants", nargs="+", metavar="NAME")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="of each answer (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="rows (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory)
        amounts = {kind: amount for kind, amount in write_rows(args.folder, data).items() if amount}
        pipes = []
        for name in args.contestants:
            pipe, other = context.Pipe()
            context.Process(target=work, args=(name, data, args, other), daemon=True).start()
            other.close()
            pipe.recv()
            pipes.append(pipe)
        seconds: list[dict[str, list[float]]] = [{kind: [] for kind in amounts} for _ in pipes]
        for round in range(args.rounds + 1):
            for pipe, taken in zip(pipes, seconds, strict=True):
                for kind in amounts:
                    pipe.send(kind)
                    taken[kind].append(pipe.recv()) if round else pipe.recv()
        for pipe in pipes:
            pipe.send("")
    print(f"{args.tokens} tokens an answer, {args.batch} rows, {args.rounds} rounds, {machine()}\n")
    unit = {"speech": "RTFx (s of speech by s)", "pictures": "pictures by s"}
    print("| |" + "".join(f" {unit[kind]} | relative |" for kind in amounts) + "\n|---|" + "---|---|" * len(amounts))
    rates = [{kind: amounts[kind] / statistics.median(taken[kind]) for kind in amounts} for taken in seconds]
    for name, own in zip(args.contestants, rates, strict=True):
        cells = (f" {own[kind]:.3f} | {own[kind] / rates[-1][kind]:.2f} |" for kind in amounts)
        print(f"| {name} |" + "".join(cells))


if __name__ == "__main__":
    main()
