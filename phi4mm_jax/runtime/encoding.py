"""Runs the image and speech encoders over all media of a batch and says which embedding each position takes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from phi4mm_jax.models.audio import LEAD
from phi4mm_jax.processing.prompt import ROW_SEPARATOR, AudioFeatures, Prompt
from phi4mm_jax.runtime.buckets import round_up, split_exactly
from phi4mm_jax.runtime.steps import Steps, Weights


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Where the embeddings of one encoder call go in one prompt."""

    embeddings: jax.Array  # [M, D], shared by the prompts whose media were encoded together
    index: np.ndarray  # [T] int32: row of `embeddings` for each position, -1 for none


def encode_media(steps: Steps, weights: Weights, prompts: Sequence[Prompt]) -> list[list[Placement]]:
    """Encodes the media of all prompts together; the result of each prompt does not depend on the others."""
    placements: list[list[Placement]] = [[] for _ in prompts]
    for encode in (_encode_images, _encode_clips):
        for owner, placement in encode(steps, weights, prompts):
            placements[owner].append(placement)
    return placements


def _encode_images(steps: Steps, weights: Weights, prompts: Sequence[Prompt]) -> list[tuple[int, Placement]]:
    vision = steps.model.vision
    images = [image for prompt in prompts for image in prompt.images]
    if not images:
        return []
    crops, masks, positions = (
        np.concatenate([getattr(image, name) for image in images]) for name in ("crops", "mask", "position_ids")
    )
    masks = masks.reshape(len(masks), -1)
    calls, call_of_crop, first_row_of_crop = [], [], []
    for count in split_exactly(len(crops), steps.runtime.engine.crop_buckets):
        part = slice(len(call_of_crop), len(call_of_crop) + count)
        call_of_crop += [len(calls)] * count
        first_row_of_crop += [i * vision.tokens_per_crop for i in range(count)]
        calls.append(steps.encode_images(weights.vision, crops[part], masks[part], positions[part]))

    placements, first_crop = [], 0
    for owner, prompt in enumerate(prompts):
        sources = []  # (call, row) of every image token of the prompt
        for image in prompt.images:
            # Separators come from the call that holds the image's first crop: they lie behind its last token.
            crop = first_crop + np.maximum(image.layout, 0) // vision.tokens_per_crop
            call = np.asarray(call_of_crop)[crop]
            row = np.asarray(first_row_of_crop)[crop] + image.layout % vision.tokens_per_crop
            separator = np.where(image.layout == ROW_SEPARATOR, -2, -1) + calls[call_of_crop[first_crop]].shape[0]
            sources.append(np.stack([call, np.where(image.layout < 0, separator, row)]))
            first_crop += len(image.crops)
        if sources:
            where = np.flatnonzero(prompt.token_ids == steps.model.tokens.image)
            call, row = np.concatenate(sources, axis=1)
            for used in np.unique(call):
                mine = call == used
                placements.append((owner, _placement(calls[used], prompt, where[mine], row[mine])))
    return placements


@dataclasses.dataclass(frozen=True, eq=False)
class _Window:
    """One attention window of one clip."""

    owner: int
    """Index of its prompt."""
    clip: AudioFeatures
    """Its clip."""
    start: int
    """Its first frame."""
    frames: int
    """Frames from there to the end of the prompt's longest clip."""
    num_keys: int
    """Sub-frames that attention sees."""
    where: np.ndarray
    """Positions of its tokens in the prompt."""


def _encode_clips(steps: Steps, weights: Weights, prompts: Sequence[Prompt]) -> list[tuple[int, Placement]]:
    audio, engine = steps.model.audio, steps.runtime.engine
    alike = defaultdict(list)  # bucket of frames -> windows
    for owner, prompt in enumerate(prompts):
        for window in _windows(steps, owner, prompt):
            needed = max(window.num_keys, len(window.where)) * audio.time_reduction
            alike[min(round_up(needed, engine.audio_buckets), audio.window_frames)].append(window)

    placements = []
    for bucket, windows in alike.items():
        for count in split_exactly(len(windows), engine.window_buckets):
            part, windows = windows[:count], windows[count:]
            features = np.zeros((count, LEAD + bucket, audio.input_size), np.float32)
            for i, window in enumerate(part):
                lead = LEAD if window.start else 0
                frames = window.clip.features[window.start - lead : window.start + bucket]
                features[i, LEAD - lead : LEAD - lead + len(frames)] = frames
            embeddings = steps.encode_audio(
                weights.audio,
                features,
                np.array([window.start > 0 for window in part]),
                np.array([window.frames for window in part], np.int32),
                np.array([window.num_keys for window in part], np.int32),
                np.array([bool(prompts[window.owner].images) for window in part]),
            )
            for i, window in enumerate(part):
                rows = i * (bucket // audio.time_reduction) + np.arange(len(window.where))
                placement = _placement(embeddings, prompts[window.owner], window.where, rows)
                placements.append((window.owner, placement))
    return placements


def _windows(steps: Steps, owner: int, prompt: Prompt) -> Iterator[_Window]:
    """Cuts the clips of a prompt into windows."""
    audio = steps.model.audio
    where = np.flatnonzero(prompt.token_ids == steps.model.tokens.audio)
    longest = max((len(clip.features) for clip in prompt.audios), default=0)
    for clip in prompt.audios:
        mine, where = where[: clip.num_tokens], where[clip.num_tokens :]
        for first in range(0, clip.num_tokens, audio.window):
            tokens = mine[first : first + audio.window]
            # The original passes no mask for a lone clip, so that beyond one window the zero padding of the last
            # window is attended to; with several clips, each sees its own sub-frames.
            unmasked = len(prompt.audios) == 1 and clip.num_tokens > audio.window
            num_keys = audio.window if unmasked else len(tokens)
            start = first * audio.time_reduction
            yield _Window(owner, clip, start, longest - start, num_keys, tokens)


def _placement(embeddings: jax.Array, prompt: Prompt, where: np.ndarray, rows: np.ndarray) -> Placement:
    index = np.full(len(prompt.token_ids), -1, np.int32)
    index[where] = rows
    return Placement(embeddings, index)
