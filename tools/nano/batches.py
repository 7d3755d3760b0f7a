"""Training batches, each a pure function of a seed and its number: any step can be made again, by any worker."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

import numpy as np

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.models.audio import LEAD
from phi4mm_jax.processing.images import image_features
from phi4mm_jax.processing.prompt import ROW_SEPARATOR, ImageFeatures
from phi4mm_jax.processing.tokenizer import Tokenizer
from tools.nano.conversations import SYSTEM, TRANSCRIBE, Turns, text_conversation
from tools.nano.marks import IGNORED, Picture, by_cell, named_cells, patch_labels, patch_prints
from tools.nano.network import LETTERS, Batch
from tools.nano.pictures import TILE
from tools.nano.questions import answer_about, ask_about_one, ask_about_two, random_picture
from tools.nano.recordings import Recordings
from tools.nano.vocabulary import QUESTION_KINDS, WORDS

_NOTHING = "."
"""What the image tokens say that say nothing."""
_NOTHING_WEIGHT = 0.2
_LONG = 0.25
"""Share of short rows trained under the long rope factors, so that both regimes know everything."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What all batches of a stage depend on."""

    stage: str
    """Its name, so that two stages with the same kind of batches see other ones."""
    config: ModelConfig
    tokenizer: Tokenizer
    out: Path
    """Directory of the run."""
    steps: int
    """How many batches the stage takes."""
    seed: int

    def random(self, index: int) -> Random:
        """The source of all chance of batch `index`."""
        return Random(f"{self.stage} {self.seed} {index}")


class Writer:
    """Turns conversations into padded token rows."""

    def __init__(self, run: Run):
        self.config, self._tokenizer = run.config, run.tokenizer
        ids = run.tokenizer.control_ids
        self._system, self._open, self._close = (ids[f"<|{name}|>"] for name in ("system", "assistant", "end"))
        self._image, self._audio = (
            run.tokenizer.token_name(i) for i in (run.config.tokens.image, run.config.tokens.audio)
        )

    def row(self, turns: Turns, images: int = 0, audios: int = 0, system: str = "") -> np.ndarray:
        """Token ids of a conversation as the chat template and the media placeholders make them.

        Args:
          turns: what is asked and answered.
          images: image tokens at the beginning of the first question.
          audios: audio tokens that follow.
          system: system message, if any.
        """
        text = f"<|system|>{system}<|end|>" if system else ""
        media = self._image * images + self._audio * audios
        for question, answer in turns:
            text += f"<|user|>{media}{question}<|end|><|assistant|>{answer}<|end|>"
            media = ""
        return np.asarray(self._tokenizer.encode(text, allow_special=True), np.int32)

    def batch(self, rows: Sequence[np.ndarray], length: int, rng: Random) -> Batch:
        """Pads rows to a common length; the answers and the tokens that end them are what is predicted.

        Raises:
          ValueError: a row is longer.
        """
        if (longest := max(map(len, rows))) > length:
            raise ValueError(f"a row of {longest} tokens in a batch of {length}")
        tokens = np.full((len(rows), length), self.config.tokens.pad, np.int32)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = row
        # Within the k-th answer, k questions and k - 1 answers have ended.
        opened = np.cumsum(tokens == self._open, axis=1)
        ended = np.cumsum(tokens == self._close, axis=1) - (tokens == self._close) - (tokens[:, :1] == self._system)
        targets = (opened > 0) & (ended == 2 * opened - 1) & (tokens != self._open)
        limit = self.config.text.original_max_position_embeddings
        long = np.array([len(row) > limit or rng.random() < _LONG for row in rows])
        return Batch(tokens=tokens, targets=targets, use_long=long)


# --- text ----------------------------------------------------------------------------------------------------


class TextBatches:
    """Conversations about words and numbers, short ones and long ones in batches of their own."""

    def __init__(self, run: Run, **shares: int):
        """Opens the data; `shares` are those of the tasks that fit in a short row."""
        self._writer, self._run, self._shares = Writer(run), run, shares

    def __call__(self, index: int) -> Batch:
        """Makes batch `index`."""
        rng = self._run.random(index)
        if rng.random() < 0.2:
            tasks, length = ["repeat"] * 32, 104
        else:
            tasks, length = rng.choices(tuple(self._shares), tuple(self._shares.values()), k=64), 40
        rows = [
            self._writer.row(text_conversation(rng, task), system=rng.choice(SYSTEM) if rng.random() < 0.1 else "")
            for task in tasks
        ]
        return self._writer.batch(rows, length, rng)


# --- speech --------------------------------------------------------------------------------------------------


class SpeechBatches:
    """Recordings of about equal length, to be written down."""

    _FRAMES = (128, 192, 256, 320, 416, 544)
    _FRAMES_PER_BATCH = 6144
    _SHORT = 192  # frames
    _MAX_LETTERS, _MAX_WORDS = 88, 12
    _TEXT = 24  # tokens of a row that are not audio

    def __init__(self, run: Run, short: float = 0.0):
        """Opens the data; for a share `short` of the training only short recordings, without which CTC never starts."""
        self._writer, self._run, self._short = Writer(run), run, short * run.steps
        self._recordings = Recordings(run.out / "recordings")
        bucket = np.searchsorted(self._FRAMES, self._recordings.lengths)
        self._buckets = [np.flatnonzero(bucket == i) for i in range(len(self._FRAMES))]

    def __call__(self, index: int) -> Batch:
        """Makes batch `index`."""
        rng = self._run.random(index)
        longest = self._SHORT if index < self._short else self._FRAMES[-1]
        sizes = [self._FRAMES_PER_BATCH // frames for frames in self._FRAMES]
        shares = [
            len(bucket) / size if frames <= longest else 0.0
            for bucket, size, frames in zip(self._buckets, sizes, self._FRAMES, strict=True)
        ]
        i = rng.choices(range(len(sizes)), shares)[0]
        chosen = rng.choices(self._buckets[i], k=sizes[i])
        return self._batch(chosen, self._FRAMES[i], rng)

    def _batch(self, chosen: Sequence[int], frames: int, rng: Random) -> Batch:
        audio = self._writer.config.audio
        features, counts = _padded_features(self._recordings, chosen, frames, rng)
        texts = [self._recordings.texts[i] for i in chosen]
        rows = [
            self._writer.row([(rng.choice(TRANSCRIBE), text)], audios=audio.num_tokens(count))
            for text, count in zip(texts, counts, strict=True)
        ]
        letters, words = (
            _classes(texts, LETTERS, self._MAX_LETTERS),
            _classes(map(str.split, texts), WORDS, self._MAX_WORDS),
        )
        batch = self._writer.batch(rows, frames // audio.time_reduction + self._TEXT, rng)
        return batch._replace(features=features, frames=counts, letters=letters, words=words)


def _padded_features(
    recordings: Recordings, chosen: Sequence[int], frames: int, rng: Random
) -> tuple[np.ndarray, np.ndarray]:
    """Features [B, LEAD + frames, mel] of changed voices, with bands and moments blanked, and frames of each [B]."""
    features = np.zeros((len(chosen), LEAD + frames, len(recordings.mean)), np.float32)
    counts = np.array([recordings.lengths[i] for i in chosen], np.int32)
    for row, i, count in zip(features, chosen, counts, strict=True):
        clip = row[LEAD : LEAD + count]
        clip[:] = _stretch(recordings.features(i).astype(np.float32), rng.uniform(0.88, 1.12))
        for _ in range(2):
            low, width = rng.randrange(clip.shape[1]), rng.randrange(12)
            clip[:, low : low + width] = recordings.mean[low : low + width]
        start, length = rng.randrange(count), rng.randrange(12)
        clip[start : start + length] = recordings.mean
    return features, counts


def _stretch(features: np.ndarray, factor: float) -> np.ndarray:
    """Stretches the spectrum [frames, mel] along its bands: a longer or shorter vocal tract makes another voice."""
    last = features.shape[1] - 1
    position = np.minimum(np.arange(last + 1) * factor, last)
    below = np.minimum(position.astype(int), last - 1)
    share = (position - below).astype(np.float32)
    return features[:, below] * (1 - share) + features[:, below + 1] * share


def _classes(texts: Iterable[Iterable[str]], alphabet: Sequence[str], length: int) -> np.ndarray:
    """Class numbers from 1 on of each text's members, 0 behind its end: [B, length] int32."""
    number = {name: i for i, name in enumerate(alphabet, start=1)}
    rows = [[number[member] for member in text] for text in texts]
    return np.array([row + [0] * (length - len(row)) for row in rows], np.int32)


# --- pictures ------------------------------------------------------------------------------------------------


class SeeingBatches:
    """Pictures without questions, as many as fill the crops; they grow harder as the training goes on."""

    _CROPS = 32
    _TILES, _SHARES = ((1, 1), (2, 1), (3, 2)), (0.84, 0.1, 0.06)

    def __init__(self, run: Run, rise: float = 0.0, says: bool = True):
        """Opens the data.

        Args:
          run: what is trained.
          rise: share of the training over which everything grows as hard as it gets.
          says: whether image tokens learn to say it in the decoder's words, beside what patches show.
        """
        self._run, self._rise, self._says = run, rise * run.steps, says

    def __call__(self, index: int) -> Batch:
        """Makes batch `index`."""
        rng = self._run.random(index)
        tiles = rng.choices(self._TILES, self._SHARES)[0]
        pictures, images, crops = [], [], 0
        while True:
            picture = random_picture(rng, _hardest(index, self._rise), tiles, pairs=0.6, numbers=0.4)
            image = image_features(picture.image, self._run.config.vision)
            if picture.image.size == (TILE, TILE):
                image = _without_global_view(image)  # which shows just the same
            crops += len(image.crops)
            if crops > self._CROPS:
                break
            pictures.append(picture)
            images.append(image)
        labels = label_arrays(self._run, pictures, images, self._CROPS)
        if not self._says:
            del labels["named"], labels["naming"]
        return Batch(**_crop_arrays(images, self._CROPS), **labels)


def _hardest(index: int, rise: float) -> float:
    """Bound of the difficulty of a batch."""
    return min(index / rise, 1.0) if rise else 1.0


def _without_global_view(image: ImageFeatures) -> ImageFeatures:
    return dataclasses.replace(image, crops=image.crops[1:], mask=image.mask[1:], position_ids=image.position_ids[1:])


class VisionBatches:
    """One or two pictures with a question; they grow harder as the training goes on."""

    # Share of the batches, rows, pictures a row, largest picture in tiles, crops of the whole batch, row length.
    _KINDS = (
        (0.84, 24, 1, (1, 1), 48, 64),
        (0.06, 16, 1, (2, 1), 48, 80),
        (0.04, 8, 1, (3, 2), 56, 160),
        (0.06, 12, 2, (1, 1), 48, 112),
    )

    def __init__(self, run: Run, rise: float = 0.0):
        """Opens the data; over a share `rise` of the training everything grows as hard as it gets."""
        self._writer, self._run, self._rise = Writer(run), run, rise * run.steps

    def __call__(self, index: int) -> Batch:
        """Makes batch `index`."""
        rng = self._run.random(index)
        hardest = _hardest(index, self._rise)
        kinds = self._KINDS if hardest > 0.15 else self._KINDS[:1]
        _, size, pictures, tiles, crops, length = rng.choices(kinds, [kind[0] for kind in kinds])[0]
        rows, images, all_shown = [], [], []
        for _ in range(size):
            ask = ask_about_two if pictures == 2 else functools.partial(ask_about_one, tiles=tiles)
            shown, question, answer = ask(rng, hardest)
            features = [image_features(picture.image, self._run.config.vision) for picture in shown]
            rows.append(self._writer.row([(question, answer)], images=sum(f.num_tokens for f in features)))
            images.append(features)
            all_shown += shown
        batch = self._writer.batch(rows, length, rng)
        arrays = image_arrays(self._run.config, batch.tokens, images, crops)
        return batch._replace(**arrays, **label_arrays(self._run, all_shown, sum(images, []), crops))


def image_arrays(
    config: ModelConfig,
    tokens: np.ndarray,  # [B, T]
    images: Sequence[Sequence[ImageFeatures]],
    num_crops: int,
) -> dict[str, np.ndarray]:
    """The image fields of a batch: crops of all rows in a line, padded to `num_crops` with crops of nothing."""
    vision = config.vision
    index = np.full(tokens.shape, -1, np.int32)
    crop = 0
    for row, is_image, pictures in zip(index, tokens == config.tokens.image, images, strict=True):
        parts = []
        for picture in pictures:
            separator = num_crops * vision.tokens_per_crop + (picture.layout != ROW_SEPARATOR)
            parts.append(np.where(picture.layout < 0, separator, crop * vision.tokens_per_crop + picture.layout))
            crop += len(picture.crops)
        row[is_image] = np.concatenate(parts)
    return _crop_arrays([image for row in images for image in row], num_crops) | {"image_index": index}


def _crop_arrays(images: Sequence[ImageFeatures], num_crops: int) -> dict[str, np.ndarray]:
    return {
        "crops": _joined([image.crops for image in images], num_crops, 0.0),
        "mask": _joined([image.mask.reshape(len(image.mask), -1) for image in images], num_crops, True),
        "positions": _joined([image.position_ids for image in images], num_crops, 0),
    }


def label_arrays(
    run: Run, pictures: Sequence[Picture], images: Sequence[ImageFeatures], num_crops: int
) -> dict[str, np.ndarray]:
    """The label fields of a batch, in the order of its crops; of each picture the last ones, which `images` has."""
    vision = run.config.vision
    counts = [len(image.crops) for image in images]
    whole = [patch_labels(picture, vision) for picture in pictures]
    labels = _joined([crops[-count:] for crops, count in zip(whole, counts, strict=True)], num_crops, IGNORED)
    prints = [patch_prints(picture, vision)[-count:] for picture, count in zip(pictures, counts, strict=True)]
    named = np.full((num_crops * vision.tokens_per_crop, 2), _token(run.tokenizer, _NOTHING), np.int32)
    naming = np.zeros(named.shape, np.float32)
    naming[(by_cell(labels, vision) != IGNORED).any(axis=1), 0] = _NOTHING_WEIGHT
    first = 0
    for picture, crops, count in zip(pictures, whole, counts, strict=True):
        left_out = (len(crops) - count) * vision.tokens_per_crop
        for cell, name in named_cells(picture, vision):
            if cell >= left_out:
                cell += first - left_out
                column = int(naming[cell, 0] == 1)
                named[cell, column], naming[cell, column] = _token(run.tokenizer, name), 1
        first += count * vision.tokens_per_crop
    return {"labels": labels, "prints": _joined(prints, num_crops, IGNORED), "named": named, "naming": naming}


@functools.cache
def _token(tokenizer: Tokenizer, name: str) -> int:
    """The token of a word as it stands after a space, or of a digit or a mark."""
    return tokenizer.encode(f" {name}" if name.isalpha() else name, allow_special=False)[0]


def _joined(arrays: Sequence[np.ndarray], length: int, fill: float) -> np.ndarray:
    """Concatenates along the first axis, padded to `length`."""
    whole = np.concatenate(arrays)
    return np.pad(whole, [(0, length - len(whole))] + [(0, 0)] * (whole.ndim - 1), constant_values=fill)


# --- spoken questions ----------------------------------------------------------------------------------------


class SpokenBatches:
    """Pictures and questions asked aloud; every third batch asks in writing, so that this is not forgotten."""

    _ROWS, _FRAMES = 16, 416

    def __init__(self, run: Run):
        self._writer, self._run = Writer(run), run
        self._written = VisionBatches(run)
        self._recordings = Recordings(run.out / "recordings")
        short = self._recordings.lengths <= self._FRAMES
        self._asking = {
            kind: [i for i, k in enumerate(self._recordings.kinds) if k == kind and short[i]] for kind in QUESTION_KINDS
        }

    def __call__(self, index: int) -> Batch:
        """Makes batch `index`."""
        if index % 3 == 2:
            return self._written(index)
        rng = self._run.random(index)
        pictures = [random_picture(rng, 1.0, (1, 1)) for _ in range(self._ROWS)]
        kinds = ["text" if picture.text else rng.choice(("colour", "shape")) for picture in pictures]
        features, counts = _padded_features(
            self._recordings, [rng.choice(self._asking[kind]) for kind in kinds], self._FRAMES, rng
        )
        images = [[image_features(picture.image, self._run.config.vision)] for picture in pictures]
        rows = [
            self._writer.row(
                [("", answer_about(picture, kind))],
                images=image[0].num_tokens,
                audios=self._run.config.audio.num_tokens(count),
            )
            for picture, kind, image, count in zip(pictures, kinds, images, counts, strict=True)
        ]
        batch = self._writer.batch(rows, 112, rng)
        arrays = image_arrays(self._run.config, batch.tokens, images, 2 * self._ROWS)
        arrays |= label_arrays(self._run, pictures, sum(images, []), 2 * self._ROWS)
        return batch._replace(features=features, frames=counts, **arrays)
