"""Trains phi4mm-nano, stage by stage as the original was trained.

    python -m tools.nano.train OUT [--stage NAME] [--steps N]

text, comparing: the decoder, which is frozen from then on. hearing, seeing: the encoders, by auxiliary heads that spell
what is said (CTC) and name what each patch shows. speech: speech encoder, its projector and the speech LoRA. vision:
the same for pictures. spoken: the projector that speech takes beside a picture, and the vision LoRA. text, hearing and
seeing depend on nothing, so they may run side by side; so may speech and vision.

A run that was stopped goes on from its last checkpoint when it is started again. OUT/STAGE/log.jsonl has the losses and
OUT/STAGE/loss.png shows them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.processing.tokenizer import Tokenizer
from tools.nano.batches import Run, SpeechBatches, SpokenBatches, TextBatches, VisionBatches
from tools.nano.network import Batch, Leaves, Network, initial_leaves
from tools.nano.recordings import Recordings, prepare
from tools.nano.tokenizer import tokenizer_files

SEED = 0
_SECONDS_PER_CHECKPOINT = 120.0
_STEPS_PER_LINE = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the training."""

    trained: tuple[str, ...]
    """Beginnings (or ends, after a "*") of the leaves that learn; all others are frozen."""
    batches: Callable[[Run], Callable[[int], Batch]]
    """Opens the data: its result makes batch after batch by index."""
    steps: int
    """Optimizer steps."""
    learning_rate: float
    """Peak; it warms up and then falls along a cosine."""
    adapter: str | None = None
    """The LoRA adapter that every row uses."""
    answers: bool = True
    """Whether the decoder answers; without, an encoder learns by its auxiliary heads alone."""
    hears: bool = False
    """Whether it needs the recordings."""
    after: tuple[str, ...] = ()
    """Stages whose results it begins with."""

    def trains(self, path: str) -> bool:
        """Whether a leaf learns in this stage."""
        return any(path.endswith(t[1:]) if t.startswith("*") else path.startswith(t) for t in self.trained)


_EAR = ("audio.layers", "audio.subsampling", "audio.relative_bias", "aux.letters", "aux.words")
_EYE = ("vision.layers", "vision.patch_embedding", "vision.position_embedding", "aux.patches")
_SPEECH = ("audio.speech_projector", "*speech_a", "*speech_b")
_VISION = ("vision.projector", "vision.row_separator", "vision.view_separator", "*vision_a", "*vision_b")
STAGES = {
    "text": Stage(
        trained=("text.",),
        batches=partial(TextBatches, add=6, compare=2, count=3, reverse=3),
        steps=8000,
        learning_rate=2e-3,
    ),
    "comparing": Stage(  # what is learned last
        trained=("text.",),
        batches=partial(TextBatches, add=3, compare=7, count=2, reverse=2),
        steps=1600,
        learning_rate=1e-3,
        after=("text",),
    ),
    "hearing": Stage(trained=_EAR, batches=SpeechBatches, steps=4000, learning_rate=1e-3, answers=False, hears=True),
    "seeing": Stage(trained=_EYE, batches=VisionBatches, steps=5000, learning_rate=1.5e-3, answers=False),
    "speech": Stage(
        trained=_EAR + _SPEECH,
        batches=SpeechBatches,
        steps=3500,
        learning_rate=1e-3,
        adapter="speech",
        hears=True,
        after=("comparing", "hearing"),
    ),
    "vision": Stage(
        trained=_EYE + _VISION,
        batches=VisionBatches,
        steps=4000,
        learning_rate=1e-3,
        adapter="vision",
        after=("comparing", "seeing"),
    ),
    "spoken": Stage(
        trained=("audio.vision_projector", *_VISION),
        batches=SpokenBatches,
        steps=1200,
        learning_rate=5e-4,
        adapter="vision",
        hears=True,
        after=("comparing", "speech", "vision"),
    ),
}


def optimizer(stage: Stage, steps: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients; vectors are not decayed."""
    warm_up = min(200, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, stage.learning_rate, warm_up, steps, 0.01 * stage.learning_rate)
    decayed = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.02, mask=decayed))


def stage_leaves(out: Path, name: str) -> Leaves:
    """The leaves that a finished stage has trained.

    Raises:
      FileNotFoundError: it has not been run.
    """
    with ocp.CheckpointManager(_checkpoints(out, name)) as manager:
        if manager.latest_step() is None:
            raise FileNotFoundError(f"{out / name}: stage {name} comes first")
        return manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())["leaves"]


def trained_leaves(out: Path, config: ModelConfig) -> Leaves:
    """All leaves after the stages that have been run in `out`."""
    leaves = initial_leaves(config, SEED)
    if (out / "recordings").is_dir():
        leaves |= Recordings(out / "recordings").normalisation()
    for name in STAGES:
        if (out / name).is_dir():
            leaves |= stage_leaves(out, name)
    return leaves


def train(out: Path, name: str, steps: int | None = None) -> None:
    """Runs a stage to its end, from its last checkpoint if there is one."""
    stage = STAGES[name]
    steps = steps or stage.steps
    config = ModelConfig.load("nano")
    tokenizer = Tokenizer(json.dumps(tokenizer_files(config)["tokenizer.json"]))
    network = Network(config)
    leaves = initial_leaves(config, SEED)
    for earlier in stage.after:
        leaves |= stage_leaves(out, earlier)
    if stage.hears:
        prepare(out / "recordings", SEED, config.audio)
        leaves |= Recordings(out / "recordings").normalisation()
    trained = {path: leaf for path, leaf in leaves.items() if stage.trains(path)}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trained}
    update = optimizer(stage, steps)
    state = {"leaves": trained, "optimizer": update.init(trained)}

    @partial(jax.jit, donate_argnums=0)
    def step(state: dict[str, Any], frozen: Leaves, batch: Batch) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        gradient = jax.grad(
            lambda leaves: network.loss(frozen | leaves, batch, stage.adapter, stage.answers), has_aux=True
        )
        gradients, metrics = gradient(state["leaves"])
        changes, moments = update.update(gradients, state["optimizer"], state["leaves"])
        return {"leaves": optax.apply_updates(state["leaves"], changes), "optimizer": moments}, metrics

    (out / name).mkdir(parents=True, exist_ok=True)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(_checkpoints(out, name), options=options) as manager:
        first = manager.latest_step() or 0
        if first:
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(first, args=ocp.args.StandardRestore(shapes))
        batches = stage.batches(Run(name, config, tokenizer, out, steps, SEED))
        data = grain.MapDataset.range(first, steps).map(batches).to_iter_dataset(grain.ReadOptions(2, 16))
        saved, sums, since = time.monotonic(), {}, time.monotonic()
        with (out / name / "log.jsonl").open("a") as log, _bar(name, first, steps) as bar:
            for index, batch in enumerate(data, start=first + 1):
                state, metrics = step(state, frozen, batch)
                sums = {key: sums.get(key, 0.0) + value for key, value in metrics.items()}
                bar.update()
                if index % _STEPS_PER_LINE == 0 or index == steps:
                    count = (index - 1) % _STEPS_PER_LINE + 1
                    means = {key: round(float(value) / count, 4) for key, value in sums.items()}
                    line = {"step": index, **means, "seconds": round(time.monotonic() - since, 1)}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    bar.set_postfix(means)
                    if bar.disable:
                        print(line, flush=True)
                    sums, since = {}, time.monotonic()
                if index == steps or time.monotonic() - saved > _SECONDS_PER_CHECKPOINT:
                    manager.save(index, args=ocp.args.StandardSave(state))
                    saved = time.monotonic()
    plot(out / name)


def plot(directory: Path) -> None:
    """Draws the logged losses of a stage to loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for key in lines[0].keys() - {"step", "seconds"}:
        axes.plot([line["step"] for line in lines], [line.get(key) for line in lines], label=key, linewidth=1)
    axes.set(title=directory.name, xlabel="step", yscale="log")
    axes.legend()
    figure.savefig(directory / "loss.png", dpi=120)
    pyplot.close(figure)


def _checkpoints(out: Path, name: str) -> Path:
    return (out / name / "checkpoints").resolve()


def _bar(name: str, first: int, steps: int) -> tqdm:
    return tqdm(desc=name, initial=first, total=steps, unit="step", disable=not sys.stderr.isatty())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory of the run: data, checkpoints, logs")
    parser.add_argument("--stage", choices=STAGES, help="only this one; without, all that are not finished")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the stage's own")
    options = parser.parse_args(arguments)
    try:
        for name in [options.stage] if options.stage else STAGES:
            train(options.out, name, options.steps)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; start again to go on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
