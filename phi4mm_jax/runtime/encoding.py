"""Runs the encoders, media of several prompts to a call, and says which embedding each position of a prompt takes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from phi4mm_jax.models.audio import LEAD
from phi4mm_jax.processing.prompt import ROW_SEPARATOR, AudioFeatures, ImageFeatures, Prompt
from phi4mm_jax.runtime.buckets import round_up, split_exactly
from phi4mm_jax.runtime.steps import Steps, Weights


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Where the embeddings of one encoder call go in one prompt."""

    embeddings: jax.Array  # [M, D], shared by the prompts whose media were encoded together
    index: np.ndarray  # [T] int32: row of `embeddings` for each position, -1 for none


@dataclasses.dataclass(frozen=True, eq=False)
class Medium:
    """A picture or a recording in a prompt, with all that its embeddings depend on."""

    features: ImageFeatures | AudioFeatures
    where: np.ndarray
    """[N] positions of its tokens in the prompt."""
    context: tuple[bool, bool, int] | None = None
    """Of a recording: whether there are pictures, whether it is the only one, and the frames of the longest."""

    @property
    def key(self) -> bytes:
        """Equal for media with the same embeddings alone."""
        kind = type(self.features).__name__
        return hashlib.blake2b(self.features.digest + f"{kind}{self.context}".encode(), digest_size=16).digest()


class Encoding:
    """The embeddings of one medium, which may come from several calls."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens
        self.missing = 0
        """Calls that have not been made."""
        self.parts: list[tuple[jax.Array, np.ndarray]] = []
        """Embeddings [M, D] of a call, and [N] int32 the row of them that each token takes, -1 for none."""

    def placements(self, where: np.ndarray, length: int) -> Iterator[Placement]:
        """Places it at positions `where` [N] of a prompt of `length` tokens."""
        for embeddings, rows in self.parts:
            index = np.full(length, -1, np.int32)
            index[where] = rows
            yield Placement(embeddings, index)


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderCall:
    """One call of an encoder."""

    encode: Callable[[Weights], jax.Array]
    """Returns embeddings [M, D]."""
    targets: Sequence[tuple[Encoding, np.ndarray]]
    """What it is for, and [N] int32 the row that each token takes, -1 for none."""
    work: Mapping[str, int]
    """What it adds to the `Counts`."""

    def run(self, weights: Weights) -> jax.Array:
        """Makes the call and hands the embeddings to what they are for."""
        embeddings = self.encode(weights)
        for encoding, rows in self.targets:
            encoding.parts.append((embeddings, rows))
            encoding.missing -= 1
        return embeddings


def media_of(steps: Steps, prompt: Prompt) -> list[Medium]:
    """The media of a prompt."""
    tokens = steps.model.tokens
    longest = max((len(clip.features) for clip in prompt.audios), default=0)
    context = (bool(prompt.images), len(prompt.audios) == 1, longest)
    media = []
    for features, token, about in ((prompt.images, tokens.image, None), (prompt.audios, tokens.audio, context)):
        where = np.flatnonzero(prompt.token_ids == token)
        for medium in features:
            media.append(Medium(medium, where[: medium.num_tokens], about))
            where = where[medium.num_tokens :]
    return media


def encode_media(steps: Steps, weights: Weights, prompts: Sequence[Prompt]) -> list[list[Placement]]:
    """Encodes the media of all prompts together; the result of each prompt does not depend on the others."""
    media = [media_of(steps, prompt) for prompt in prompts]
    encodings, calls = plan_encoding(steps, [medium for own in media for medium in own])
    for call in calls:
        call.run(weights)
    left = iter(encodings)
    return [
        [p for medium in own for p in next(left).placements(medium.where, len(prompt.token_ids))]
        for prompt, own in zip(prompts, media, strict=True)
    ]


def plan_encoding(steps: Steps, media: Sequence[Medium]) -> tuple[list[Encoding], list[EncoderCall]]:
    """Plans how media are encoded together: each one's encoding, to be filled by the calls."""
    encodings = [Encoding(medium.features.num_tokens) for medium in media]
    images = [(m.features, e) for m, e in zip(media, encodings, strict=True) if isinstance(m.features, ImageFeatures)]
    clips = [(m, e) for m, e in zip(media, encodings, strict=True) if isinstance(m.features, AudioFeatures)]
    calls = [*_image_calls(steps, images), *_audio_calls(steps, clips)]
    for call in calls:
        for encoding, _ in call.targets:
            encoding.missing += 1
    return encodings, calls


class EncodingCache:
    """The latest encodings by their media's keys, up to a number of tokens."""

    def __init__(self, max_tokens: int):
        self._max_tokens = max_tokens
        self._encodings: OrderedDict[bytes, Encoding] = OrderedDict()

    def get(self, key: bytes) -> Encoding | None:
        """The encoding of a medium, which its calls may not have filled yet."""
        if key in self._encodings:
            self._encodings.move_to_end(key)
        return self._encodings.get(key)

    def put(self, key: bytes, encoding: Encoding) -> None:
        """Keeps an encoding, and forgets the oldest ones beyond the limit."""
        self._encodings[key] = encoding
        left = self._max_tokens
        for key, encoding in reversed(list(self._encodings.items())):
            left -= encoding.num_tokens
            if left < 0:
                del self._encodings[key]

    def drop(self, encoding: Encoding) -> None:
        """Forgets one, if it is there."""
        self._encodings = OrderedDict((key, e) for key, e in self._encodings.items() if e is not encoding)


# --- images --------------------------------------------------------------------------------------------------


def _image_calls(steps: Steps, images: Sequence[tuple[ImageFeatures, Encoding]]) -> Iterator[EncoderCall]:
    if not images:
        return
    vision = steps.model.vision
    crops, masks, positions = (
        np.concatenate([getattr(image, name) for image, _ in images]) for name in ("crops", "mask", "position_ids")
    )
    masks = masks.reshape(len(masks), -1)
    counts = split_exactly(len(crops), steps.runtime.engine.crop_buckets)
    call_of_crop = np.repeat(np.arange(len(counts)), counts)
    first_crops = np.cumsum([0, *(len(image.crops) for image, _ in images)])
    starts = np.cumsum([0, *counts])
    for call, (start, count) in enumerate(zip(starts, counts, strict=False)):
        targets = []
        for (image, encoding), first in zip(images, first_crops, strict=False):
            # Separators come from the call that holds the image's first crop: they lie behind its last token.
            is_separator = image.layout < 0
            crop = first + np.where(is_separator, 0, image.layout // vision.tokens_per_crop)
            row = (crop - start) * vision.tokens_per_crop + image.layout % vision.tokens_per_crop
            separator = np.where(image.layout == ROW_SEPARATOR, 0, 1) + count * vision.tokens_per_crop
            rows = np.where(call_of_crop[crop] == call, np.where(is_separator, separator, row), -1).astype(np.int32)
            if np.any(rows >= 0):
                targets.append((encoding, rows))
        part = slice(start, start + count)
        arguments = crops[part], masks[part], positions[part]
        work = {"crops": count, "patches": int(masks[part].sum()), "patches_computed": masks[part].size}
        yield EncoderCall(lambda weights, a=arguments: steps.encode_images(weights.vision, *a), targets, work)


# --- speech --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Window:
    """One attention window of one clip."""

    clip: Medium
    encoding: Encoding
    first: int
    """Its first token in the clip."""
    num_tokens: int
    num_keys: int
    """Sub-frames that attention sees."""


def _audio_calls(steps: Steps, clips: Sequence[tuple[Medium, Encoding]]) -> Iterator[EncoderCall]:
    audio, engine = steps.model.audio, steps.runtime.engine
    alike = defaultdict(list)  # bucket of frames -> windows
    for window in (window for clip, encoding in clips for window in _windows(steps, clip, encoding)):
        needed = max(window.num_keys, window.num_tokens) * audio.time_reduction
        alike[min(round_up(needed, engine.audio_buckets), audio.window_frames)].append(window)
    for bucket, windows in alike.items():
        for count in split_exactly(len(windows), engine.window_buckets):
            yield _audio_call(steps, windows[:count], bucket)
            windows = windows[count:]


def _windows(steps: Steps, clip: Medium, encoding: Encoding) -> Iterator[_Window]:
    """Cuts a clip into windows."""
    audio = steps.model.audio
    total = clip.features.num_tokens
    # The original passes no mask for a lone clip, so that beyond one window the zero padding of the last window is
    # attended to; with several clips, each sees its own sub-frames.
    _, lone, _ = clip.context
    for first in range(0, total, audio.window):
        count = min(audio.window, total - first)
        yield _Window(clip, encoding, first, count, audio.window if lone and total > audio.window else count)


def _audio_call(steps: Steps, windows: Sequence[_Window], bucket: int) -> EncoderCall:
    audio = steps.model.audio
    features = np.zeros((len(windows), LEAD + bucket, audio.input_size), np.float32)
    continues, frames, num_keys, with_image, targets = [], [], [], [], []
    for i, window in enumerate(windows):
        has_images, _, longest = window.clip.context
        start = window.first * audio.time_reduction
        lead = LEAD if start else 0
        part = window.clip.features.features[start - lead : start + bucket]
        features[i, LEAD - lead : LEAD - lead + len(part)] = part
        continues.append(start > 0)
        frames.append(longest - start)
        num_keys.append(window.num_keys)
        with_image.append(has_images)
        rows = np.full(window.encoding.num_tokens, -1, np.int32)
        first_row = i * (bucket // audio.time_reduction)
        rows[window.first : window.first + window.num_tokens] = first_row + np.arange(window.num_tokens)
        targets.append((window.encoding, rows))
    arguments = (
        features,
        np.array(continues),
        np.array(frames, np.int32),
        np.array(num_keys, np.int32),
        np.array(with_image),
    )
    own = (min(len(w.clip.features.features) - w.first * audio.time_reduction, bucket) for w in windows)
    work = {"audio_frames": sum(own), "audio_frames_computed": len(windows) * bucket}
    return EncoderCall(lambda weights: steps.encode_audio(weights.audio, *arguments), targets, work)
