"""The recordings that speech is learned from, spoken once and kept as log-mel features.

`prepare(OUT)` writes them to OUT/recordings: `features.f16` [all frames, mel] float16, and `index.json` with each
recording's text, kind and first frame. Speaking is slower than training, so it is done once, on all processors.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from tqdm import tqdm

from phi4mm_jax.config import AudioConfig
from phi4mm_jax.processing.audio import audio_features
from tools.nano.speech import VOICES, record
from tools.nano.vocabulary import QUESTION_KINDS, is_held_out, question, sentence

NUM_SENTENCES, NUM_QUESTIONS = 30_000, 4_000


def text_of(seed: int, index: int) -> tuple[str, str]:
    """Kind and text of a recording: sentences first, then questions about pictures."""
    rng = Random(f"recording {seed} {index}")
    while True:
        if index < NUM_SENTENCES:
            kind, text = "sentence", sentence(rng)
        else:
            kind = rng.choice(QUESTION_KINDS)
            text = question(rng, kind)
        if not is_held_out(text):
            return kind, text


def _features_of(index: int, seed: int, config: AudioConfig) -> np.ndarray:
    rng = np.random.default_rng([seed, index])
    samples, rate = record(text_of(seed, index)[1], rng, VOICES)
    return audio_features(samples, rate, config).features.astype(np.float16)


def prepare(out: Path, seed: int, config: AudioConfig) -> None:
    """Speaks all recordings into `out`, unless they are there; what is interrupted begins anew."""
    if out.is_dir():
        return
    partial_out = out.with_name(out.name + ".partial")
    shutil.rmtree(partial_out, ignore_errors=True)
    partial_out.mkdir(parents=True)
    count = NUM_SENTENCES + NUM_QUESTIONS
    starts = [0]
    total, squares = np.zeros(config.input_size), np.zeros(config.input_size)
    with (
        (partial_out / "features.f16").open("wb") as file,
        multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool,
    ):
        spoken = pool.imap(partial(_features_of, seed=seed, config=config), range(count), chunksize=64)
        for features in tqdm(spoken, desc="recordings", total=count, disable=not sys.stderr.isatty()):
            file.write(features.tobytes())
            starts.append(starts[-1] + len(features))
            total += features.sum(axis=0, dtype=np.float64)
            squares += np.square(features.astype(np.float64)).sum(axis=0)
    mean = total / starts[-1]
    index = {
        "recordings": [text_of(seed, i) for i in range(count)],
        "starts": starts,
        "mean": mean.tolist(),
        "std": np.sqrt(squares / starts[-1] - mean**2).tolist(),
    }
    (partial_out / "index.json").write_text(json.dumps(index))
    partial_out.replace(out)


class Recordings:
    """What `prepare` has written."""

    def __init__(self, directory: Path):
        index = json.loads((directory / "index.json").read_text())
        self.kinds, self.texts = zip(*index["recordings"], strict=True)
        self.starts = np.asarray(index["starts"])
        self.mean, self.std = (np.asarray(index[key], np.float32) for key in ("mean", "std"))
        self._features = np.memmap(directory / "features.f16", np.float16, "r").reshape(-1, len(self.mean))

    @property
    def lengths(self) -> np.ndarray:
        """[N] frames of each recording."""
        return np.diff(self.starts)

    def normalisation(self) -> dict[str, np.ndarray]:
        """The leaves that bring features to mean 0 and variance 1."""
        return {"audio.mean": self.mean, "audio.inv_std": 1 / self.std}

    def features(self, index: int) -> np.ndarray:
        """Log-mel features of one recording: [frames, mel] float16."""
        return self._features[self.starts[index] : self.starts[index + 1]]
