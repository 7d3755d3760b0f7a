"""What each number format costs in quality: the bundled model on its held-out tests.

    python -m benchmarks.quality [--count 100] [--only int4] [--plot OUT.png]

Every format answers the same tests. It also reads their right answers, which gives the divergence (Kullback-Leibler) of
its distribution of each token from that of float32, and how often its likeliest token is the same. The last column is
the divergence of the tests' tiny model of random weights from what the original's code computes with these. Calibration
takes conversations of training. Activations are float32 and products XLA's, so that the formats alone differ: with
PHI4MM_NATIVE=1 a CPU's compiled kernel rounds activations, whatever the format.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.bandwidth import step_bytes
from pallas_kernels.quantized import QuantizedArray
from phi4mm_jax import Phi4MM
from phi4mm_jax.runtime.scoring import score
from tools.nano.conversations import TASKS, TRANSCRIBE, text_conversation
from tools.nano.evaluate import measure
from tools.nano.heldout import TESTS, Test, ask, clip_of, items
from tools.nano.questions import ask_about_one
from tools.nano.speech import VOICES
from tools.nano.vocabulary import is_held_out, sentence

SCORED = {
    "text": "text: ",
    "speech, word error rate": "speech: known voices",
    "one word": "reading: one, large print",
    "figure": "figure: colour and shape",
    "spoken question": "spoken question about a picture",
}
PROMPTS = 16  # of each test, for the divergence
CALIBRATION = 20  # conversations of each kind
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"

Leaves = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """How the weights are held."""

    quantize: str | None = None
    group_size: int = 64
    zero_point: bool = False
    calibrated: bool = False
    params: str = "bfloat16"
    kv_cache: str = "float32"

    @property
    def fits_golden(self) -> bool:
        """Whether the tests' model can have it: it has no groups of 64, and nothing to calibrate with."""
        return not self.calibrated and (self.quantize != "int4" or self.group_size == 32)

    def load(self, calibration: Sequence[Any], source: str | Path = "nano") -> Phi4MM:
        """A model, the bundled one by default."""
        dtypes = {"params": self.params, "activations": "float32", "kv_cache": self.kv_cache}
        dtypes["matmul_precision"] = "highest"
        settings = {"group_size": self.group_size, "zero_point": self.zero_point}
        at_once = {} if self.calibrated else {"quantize": self.quantize, "quantization": settings}
        model = Phi4MM.from_pretrained(source, dtypes=dtypes, **at_once, progress=False)
        if self.calibrated:
            model.quantize(calibration, self.quantize, **settings)
        return model


FORMS = {
    "float32": Form(params="float32"),
    "bfloat16": Form(),
    "bfloat16, int8 cache": Form(kv_cache="int8"),
    "int8": Form("int8"),
    "w8a8": Form("w8a8"),
    "fp8": Form("fp8"),
    "int4, groups of 64": Form("int4"),
    "int4, groups of 64, zero point": Form("int4", zero_point=True),
    "int4, groups of 32": Form("int4", 32),
    "int4, groups of 32, zero point": Form("int4", 32, zero_point=True),
    "int4, groups of 64, calibrated": Form("int4", calibrated=True),
    "int4, groups of 64, zero point, calibrated": Form("int4", zero_point=True, calibrated=True),
    "int4, groups of 32, calibrated": Form("int4", 32, calibrated=True),
}
"""The reference first. The width of this model has no groups of 128."""


def calibration_conversations() -> list[list[dict[str, Any]]]:
    """Conversations of training, of every kind."""
    rng = Random("calibration")
    turns: list[list[dict[str, Any]]] = []

    def add(*messages: dict[str, Any], answer: str) -> None:
        turns.append([*messages, {"role": "assistant", "content": answer}])

    for task in TASKS:
        for _ in range(CALIBRATION // 2):
            (asked, answer), *_ = text_conversation(rng, task)
            add(ask(asked), answer=answer)
    for _ in range(CALIBRATION):
        while is_held_out(text := sentence(rng, 3, 8)):
            pass
        add(ask(rng.choice(TRANSCRIBE), clips=[clip_of(rng, text, VOICES)]), answer=text)
        pictures, asked, answer = ask_about_one(rng, 1.0, (1, 1))
        add(ask(asked, pictures), answer=answer)
    return turns


def answer_logits(model: Phi4MM, tests: Sequence[Test]) -> np.ndarray:
    """Log-probabilities of every token of the right answers: float64 [tokens, V]."""
    rows = []
    for test in tests:
        for item in items(test, PROMPTS):
            asked = model.processor.conversation(item.messages)
            told = [*item.messages, {"role": "assistant", "content": item.expected}]
            whole = model.processor.conversation(told, add_generation_prompt=False)
            rows.append(score(model.steps, model.weights, whole)[len(asked.token_ids) - 1 : -2])
    return log_softmax(np.concatenate(rows))


def golden_divergence(model: Phi4MM) -> float:
    """Divergence from what the original's code computes, over every token of the tests' prompts."""
    expected, found = [], []
    with np.load(GOLDEN / "model.npz") as arrays:
        for name, case in json.loads((GOLDEN / "cases.json").read_text()).items():
            images = [GOLDEN / "media" / f"{image}.png" for image in case["images"]]
            audios = [GOLDEN / "media" / f"{clip}.wav" for clip in case["audios"]]
            expected.append(arrays[f"logits/{name}"])
            found.append(model.logits(case["ids"], images=images, audios=audios))
    return divergence(log_softmax(np.concatenate(expected)), log_softmax(np.concatenate(found)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits [tokens, V]: float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def divergence(exact: np.ndarray, likely: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of log-probabilities [tokens, V] from the exact ones."""
    return float((np.exp(exact) * (exact - likely)).sum(axis=-1).mean())


def weight_errors(leaves: Leaves, reference: Leaves) -> list[float]:
    """Relative error of the projections of each layer of the decoder."""
    squares: dict[str, np.ndarray] = {}
    for path, exact in reference.items():
        if path.startswith("text.layers.") and path.endswith(".weight") and exact.ndim == 2:
            leaf = leaves[path]
            value = leaf.dequantize(jnp.float32) if isinstance(leaf, QuantizedArray) else leaf.astype(jnp.float32)
            parts = np.array([jnp.square(value - exact).sum(), jnp.square(exact).sum()])
            layer = path.split(".")[2]
            squares[layer] = squares.get(layer, 0) + parts
    return [float(np.sqrt(error / size)) for error, size in squares.values()]


def main() -> None:
    """Prints a table, and draws it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="items of each test (%(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only formats whose name holds this")
    parser.add_argument("--plot", type=Path, help="file to draw divergence against bytes per token into")
    options = parser.parse_args()
    os.environ.setdefault("PHI4MM_NATIVE", "0")
    tests = {name: [test for test in TESTS if test.name.startswith(start)] for name, start in SCORED.items()}
    every = [test for group in tests.values() for test in group]
    calibration = calibration_conversations()
    reference = FORMS["float32"].load(calibration)
    exact, exact_leaves = answer_logits(reference, every), reference.steps.unpack(reference.weights)
    columns = ("MB a token", "error of the weights, mean and worst layer", "divergence", "same token", *SCORED)
    columns += ("divergence, random weights",)
    print(f"| format | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    points = {}
    for name, form in tqdm(FORMS.items(), unit="format", disable=not sys.stderr.isatty()):
        if options.only not in name:
            continue
        model = form.load(calibration)
        leaves = model.steps.unpack(model.weights)
        errors, likely = weight_errors(leaves, exact_leaves), answer_logits(model, every)
        same = float((exact.argmax(-1) == likely.argmax(-1)).mean())
        scores = [np.mean([measure(model, test, options.count).score for test in group]) for group in tests.values()]
        golden = f"{golden_divergence(form.load((), GOLDEN / 'hub')):.1e}" if form.fits_golden else "-"
        size, distance = points[name] = step_bytes(leaves), divergence(exact, likely)
        cells = [f"{size / 1e6:.2f}", f"{np.mean(errors):.2%}, {max(errors):.2%}", f"{distance:.1e}", f"{same:.2%}"]
        tqdm.write(f"| {name} | {' | '.join([*cells, *(f'{s:.1%}' for s in scores), golden])} |", sys.stdout)
    if options.plot:
        draw(points, options.plot)


def draw(points: Mapping[str, tuple[int, float]], path: Path) -> None:
    """Draws divergence against bytes per token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, (size, distance) in points.items():
        if distance > 0:  # all but the reference
            axes.plot(size / 1e6, distance, "x" if "calibrated" in name else "o", color="C0")
            axes.annotate(f" {name}", (size / 1e6, distance), va="center", fontsize=8)
    axes.set(xlabel="MB of weights read for a token", ylabel="divergence from float32 (nats)", yscale="log")
    axes.margins(x=0.25)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
