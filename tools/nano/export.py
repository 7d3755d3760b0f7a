"""Writes a trained phi4mm-nano as a checkpoint in the layout of the released model.

    python -m tools.nano.export OUT CHECKPOINT

OUT is the directory of the training run, all of whose stages are finished.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.weights.mapping import Entry
from tools.checkpoint_files import write_checkpoint
from tools.nano.network import Leaves
from tools.nano.tokenizer import write_tokenizer
from tools.nano.train import trained_leaves


class TrainedValues:
    """The tensors of a checkpoint, made from the leaves of the model: the inverse of loading."""

    def __init__(self, leaves: Leaves):
        self._leaves = leaves

    def chunks(self, entry: Entry) -> Iterator[bytes]:
        """Yields a tensor's bfloat16 bytes."""
        leaf = np.asarray(self._leaves[entry.path], np.float32)
        rows = leaf.reshape(entry.shape[0], -1)
        tensor = np.empty_like(rows)
        for source, target in entry.row_moves():
            tensor[source] = rows[target] / entry.scale
        yield tensor.astype(ml_dtypes.bfloat16).tobytes()


def export(out: Path, checkpoint: Path) -> None:
    """Writes the checkpoint of the run in `out`."""
    config = ModelConfig.load("nano")
    with tempfile.TemporaryDirectory() as tokenizer:
        write_tokenizer(Path(tokenizer), config)
        values = TrainedValues(trained_leaves(out, config))
        write_checkpoint(checkpoint, config, values, tokenizer=Path(tokenizer), unused=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory of the training run")
    parser.add_argument("checkpoint", type=Path, help="directory to write; must not exist")
    options = parser.parse_args(arguments)
    export(options.out, options.checkpoint)


if __name__ == "__main__":
    main()
