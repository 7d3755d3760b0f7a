"""Runs the image and speech encoders over all media of a batch and says which embedding each position takes."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import jax
import numpy as np

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


def _encode_clips(steps: Steps, weights: Weights, prompts: Sequence[Prompt]) -> list[tuple[int, Placement]]:
    audio, engine = steps.model.audio, steps.runtime.engine
    clips = defaultdict(list)  # bucket of frames -> clips
    for owner, prompt in enumerate(prompts):
        where = np.flatnonzero(prompt.token_ids == steps.model.tokens.audio)
        for clip in prompt.audios:
            mine, where = where[: clip.num_tokens], where[clip.num_tokens :]
            padded = max(len(c.features) for c in prompt.audios)
            windows = engine.audio_buckets if padded <= audio.window_frames else (audio.window_frames,)
            bucket = min(round_up(padded, windows), round_up(padded, (audio.window_frames,)))
            num_keys = _num_keys(clip, len(prompt.audios) == 1, audio.window)
            clips[bucket].append((owner, mine, clip, padded, num_keys))

    placements = []
    for bucket, members in clips.items():
        tokens_per_clip = audio.num_tokens(bucket)
        for count in split_exactly(len(members), engine.clip_buckets):
            part, members = members[:count], members[count:]
            features = np.zeros((count, bucket, audio.input_size), np.float32)
            for i, (_, _, clip, _, _) in enumerate(part):
                features[i, : len(clip.features)] = clip.features
            embeddings = steps.encode_audio(
                weights.audio,
                features,
                np.array([padded for _, _, _, padded, _ in part], np.int32),
                np.array([num_keys for _, _, _, _, num_keys in part], np.int32),
                np.array([bool(prompts[owner].images) for owner, *_ in part]),
            )
            for i, (owner, where, clip, _, _) in enumerate(part):
                rows = i * tokens_per_clip + np.arange(clip.num_tokens)
                placements.append((owner, _placement(embeddings, prompts[owner], where, rows)))
    return placements


def _num_keys(clip: AudioFeatures, alone: bool, window: int) -> int:
    """Sub-frames that attention sees.

    The original passes no mask for a lone clip, so that beyond one window the zero padding of the last window is
    attended to; with several clips, each sees its own sub-frames.
    """
    if alone and clip.num_tokens > window:
        return -(-clip.num_tokens // window) * window
    return clip.num_tokens


def _placement(embeddings: jax.Array, prompt: Prompt, where: np.ndarray, rows: np.ndarray) -> Placement:
    index = np.full(len(prompt.token_ids), -1, np.int32)
    index[where] = rows
    return Placement(embeddings, index)
