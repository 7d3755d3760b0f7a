"""Trains phi4mm-nano, stage by stage as the original was trained.

    python -m tools.nano.train OUT [--processors N] [--stage NAME [--adopt CHECKPOINT]]

text: the decoder, which is frozen from then on. hearing, looking: the encoders, by auxiliary heads that spell what is
said (CTC) and name what each patch shows. seeing: image tokens that say it. speech, listening: speech encoder, its
projector and the speech LoRA. vision: the same for pictures. spoken: the projector that speech takes beside a picture,
and the vision LoRA.

Stages that do not depend on each other run side by side, each on one processor (`schedule`). --stage runs one of them,
by all processors. --adopt takes what it learns from a checkpoint such as phi4mm_jax/assets/nano instead of training it,
so that the stages after it can be trained further without those before.

A run that was stopped goes on from its last checkpoint when it is started again. OUT/STAGE/log.jsonl has the losses and
OUT/STAGE/loss.png shows them.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.weights.loader import load
from tools.nano.batches import Run
from tools.nano.fonts import fonts
from tools.nano.network import Batch, Leaves, Network, initial_leaves
from tools.nano.progress import Progress
from tools.nano.recordings import Recordings, prepare
from tools.nano.schedule import StageError, run_side_by_side
from tools.nano.speech import VOICES, synthesize
from tools.nano.stages import STAGES, Stage
from tools.nano.tokenizer import tokenizer_files

SEED = 0
_SECONDS_PER_CHECKPOINT = 120.0

State = dict[str, Any]
"""What a checkpoint holds: the leaves that learn, and the optimizer's moments."""


class TrainingError(RuntimeError):
    """The training cannot go on; the message says what to do."""


def train(out: Path, name: str, steps: int | None = None) -> None:
    """Runs a stage to its end, from its last checkpoint if there is one.

    Args:
      out: directory of the run.
      name: the stage.
      steps: optimizer steps, if not the stage's own; a stage that was begun keeps its number.

    Raises:
      TrainingError: a stage that it builds on is not finished, or it was begun with another number of steps.
    """
    stage = STAGES[name]
    steps = steps or stage.steps
    config = ModelConfig.load("nano")
    tokenizer = Tokenizer(json.dumps(tokenizer_files(config)["tokenizer.json"]))
    leaves = _first_leaves(out, stage, config)
    trained = {path: leaf for path, leaf in leaves.items() if stage.trains(path)}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trained}
    optimizer = _optimizer(stage, steps, trained)
    step = _step(Network(config), stage, optimizer)
    state: State = {"leaves": trained, "optimizer": optimizer.init(trained)}

    _claim(out / name, steps)
    with ocp.CheckpointManager(_checkpoints(out, name), options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        first = manager.latest_step() or 0
        if first:
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(first, args=ocp.args.StandardRestore(shapes))
        if first == steps:
            print(f"{name}: finished before")
            return
        batches = stage.batches(Run(name, config, tokenizer, out, steps, SEED))
        data = grain.MapDataset.range(first, steps).map(batches).to_iter_dataset(grain.ReadOptions(2, 16))
        saved = time.monotonic()
        with Progress(out / name, first, steps) as progress:
            for index, batch in enumerate(data, start=first + 1):
                state, metrics = step(state, frozen, batch)
                progress.step(metrics)
                if index == steps or time.monotonic() - saved > _SECONDS_PER_CHECKPOINT:
                    manager.save(index, args=ocp.args.StandardSave(state))
                    saved = time.monotonic()


def adopt(out: Path, name: str, checkpoint: Path) -> None:
    """Ends a stage with the leaves of a checkpoint. Its auxiliary heads, which no checkpoint has, are left to chance.

    Raises:
      TrainingError: the stage was begun.
    """
    if (out / name).exists():
        raise TrainingError(f"{out / name}: was begun; remove it to adopt its result")
    stage, network = STAGES[name], Network(ModelConfig.load("nano"))
    abstract = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in network.shapes.items()}
    stored, _ = load(checkpoint, ModelConfig.from_checkpoint(checkpoint), abstract, lambda _, value: value)
    leaves = initial_leaves(network.config, SEED) | stored
    _claim(out / name, stage.steps)
    with ocp.CheckpointManager(_checkpoints(out, name)) as manager:
        state = {"leaves": {path: np.asarray(leaf) for path, leaf in leaves.items() if stage.trains(path)}}
        manager.save(stage.steps, args=ocp.args.StandardSave(state))


def stage_leaves(out: Path, name: str) -> Leaves:
    """The leaves that a finished stage has trained.

    Raises:
      TrainingError: it is not finished.
    """
    steps = _claimed(out / name)
    options = ocp.CheckpointManagerOptions(create=False)
    if steps is not None and _checkpoints(out, name).is_dir():
        with ocp.CheckpointManager(_checkpoints(out, name), options=options) as manager:
            if manager.latest_step() == steps:
                return manager.restore(steps, args=ocp.args.StandardRestore())["leaves"]
    raise TrainingError(f"{out}: stage {name} is not finished; run it first, with --stage {name}")


def trained_leaves(out: Path, config: ModelConfig) -> Leaves:
    """All leaves after all stages.

    Raises:
      TrainingError: a stage is not finished.
    """
    leaves = initial_leaves(config, SEED) | Recordings(out / "recordings").normalisation()
    for name in STAGES:
        leaves |= stage_leaves(out, name)
    return leaves


def _first_leaves(out: Path, stage: Stage, config: ModelConfig) -> Leaves:
    """What a stage begins with: the results of those before it, and chance."""
    leaves = initial_leaves(config, SEED)
    for earlier in stage.after:
        leaves |= stage_leaves(out, earlier)
    if stage.hears:
        prepare(out / "recordings", SEED, config.audio)
        leaves |= Recordings(out / "recordings").normalisation()
    return leaves


def _optimizer(stage: Stage, steps: int, trained: Leaves) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) for matrices, which alone are decayed, Adam for all else; gradients are clipped."""
    warm_up = min(200, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, stage.learning_rate, warm_up, steps, 0.01 * stage.learning_rate)
    muon = optax.contrib.muon(
        schedule,
        consistent_rms=0.2,  # changes as large as Adam's, so that both go by one learning rate
        weight_decay=0.02,
        adam_b2=0.98,
        muon_weight_dimension_numbers=_matrices(trained),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def _matrices(leaves: Leaves) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """Which leaves are matrices that a vector passes through: not tables, heads and kernels of convolutions."""
    others = ("text.embed.*", "vision.position_embedding", "audio.relative_bias", "*.depthwise*", "aux.*")
    return {
        path: optax.contrib.MuonDimensionNumbers()
        if leaf.ndim == 2 and not any(fnmatch.fnmatchcase(path, pattern) for pattern in others)
        else None
        for path, leaf in leaves.items()
    }


def _step(
    network: Network, stage: Stage, optimizer: optax.GradientTransformation
) -> Callable[[State, Leaves, Batch], tuple[State, dict[str, jax.Array]]]:
    """The compiled step: (state, frozen leaves, batch) -> (state, losses and accuracy)."""

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, frozen: Leaves, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        def loss(leaves: Leaves) -> tuple[jax.Array, dict[str, jax.Array]]:
            return network.loss(frozen | leaves, batch, stage.adapter, stage.answers)

        gradients, metrics = jax.grad(loss, has_aux=True)(state["leaves"])
        changes, moments = optimizer.update(gradients, state["optimizer"], state["leaves"])
        return {"leaves": optax.apply_updates(state["leaves"], changes), "optimizer": moments}, metrics

    return step


# --- files ---------------------------------------------------------------------------------------------------


def _checkpoints(out: Path, name: str) -> Path:
    return (out / name / "checkpoints").resolve()


def _claim(directory: Path, steps: int) -> None:
    """Notes how many steps a stage takes, on which its schedule depends, or checks that it is as noted."""
    claimed = _claimed(directory)
    if claimed is None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "stage.json").write_text(json.dumps({"steps": steps}) + "\n")
    elif claimed != steps:
        raise TrainingError(f"{directory}: was begun with {claimed} steps, not {steps}; remove it to begin anew")


def _claimed(directory: Path) -> int | None:
    file = directory / "stage.json"
    return json.loads(file.read_text())["steps"] if file.is_file() else None


def _check_tools() -> None:
    """Raises TrainingError at once if voices or fonts are missing, which are needed hours later."""
    try:
        fonts()
        for voice in VOICES:
            synthesize("one", voice, 160, 50)
    except (FileNotFoundError, RuntimeError) as error:
        raise TrainingError(str(error)) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory of the run: data, checkpoints, logs")
    parser.add_argument("--processors", type=int, metavar="N", help="stages to run at once (default: all processors)")
    parser.add_argument("--stage", choices=STAGES, help="only this one")
    parser.add_argument("--on", type=int, metavar="PROCESSOR", help="run it on this processor alone")
    parser.add_argument("--adopt", type=Path, metavar="CHECKPOINT", help="take its result from there")
    options = parser.parse_args(arguments)
    if not options.stage and (options.adopt or options.on is not None):
        parser.error("--adopt and --on need --stage")
    if options.processors is not None and (options.stage or options.processors < 1):
        parser.error("--processors must be at least 1, and is for all stages")
    usable = sorted(os.sched_getaffinity(0))
    if options.on is not None and options.on not in usable:
        parser.error(f"--on {options.on}: one of {', '.join(map(str, usable))} expected")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"{options.out}: a directory expected")
    if options.on is not None:
        # Before XLA makes its threads: one for each processor, and two on one would wait for each other.
        os.sched_setaffinity(0, {options.on})
    try:
        if options.adopt:
            adopt(options.out, options.stage, options.adopt)
            return 0
        _check_tools()
        if options.stage:
            train(options.out, options.stage)
        else:
            command = [sys.executable, "-m", "tools.nano.train", str(options.out)]
            run_side_by_side(
                options.out,
                usable[: options.processors],
                lambda name, on: [*command, "--stage", name, "--on", str(on)],
            )
    except (TrainingError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; start again to go on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
