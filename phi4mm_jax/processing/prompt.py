"""What processing hands to the runtime: token ids and the features of the media among them."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib

import numpy as np

ROW_SEPARATOR = -1
"""Layout entry of the vector that ends every row of image tokens (sub_GN)."""
VIEW_SEPARATOR = -2
"""Layout entry of the vector between the tiles and the global view (glb_GN)."""


class MediaError(ValueError):
    """A picture, recording or video cannot be used; the message names it and what is accepted."""


class ChatError(ValueError):
    """A conversation is malformed; the message names the message and the part."""


class PromptError(ValueError):
    """A prompt does not fit its media or the vocabulary."""


class TooLongError(PromptError):
    """A prompt takes more tokens than it may; found before all of it is made."""


class InputMode(enum.IntEnum):
    """Which adapter and which audio projector a sequence uses (phi4mm-reference, section 3)."""

    LANGUAGE = 0
    VISION = 1
    SPEECH = 2
    VISION_SPEECH = 3


@dataclasses.dataclass(frozen=True, eq=False)
class ImageFeatures:
    """One image, cut into crops."""

    crops: np.ndarray
    """[C, 3, S, S] float32, about -1 to 1; the global view first, then the tiles row by row."""
    mask: np.ndarray
    """[C, P, P] bool; true where a patch shows the image and not padding."""
    position_ids: np.ndarray
    """[C, P * P] int32; row of the position table for each patch."""
    layout: np.ndarray
    """[N] int32; where each image token comes from, in prompt order: crop * tokens_per_crop + row * tokens_per_side +
    column, or ROW_SEPARATOR, or VIEW_SEPARATOR."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the image takes in a prompt."""
        return len(self.layout)

    @functools.cached_property
    def digest(self) -> bytes:
        """Equal for equal content alone."""
        return _digest(self.crops, self.mask, self.layout)


@dataclasses.dataclass(frozen=True, eq=False)
class AudioFeatures:
    """One recording."""

    features: np.ndarray
    """[frames, mels] float32 log-mel energies, one frame each 10 ms."""
    num_tokens: int
    """Tokens that the recording takes in a prompt."""

    @functools.cached_property
    def digest(self) -> bytes:
        """Equal for equal content alone."""
        return _digest(self.features)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One sequence, ready for the model."""

    token_ids: np.ndarray
    """[T] int32; each image or audio token is one placeholder id."""
    images: tuple[ImageFeatures, ...] = ()
    """In the order of their placeholders."""
    audios: tuple[AudioFeatures, ...] = ()
    """In the order of their placeholders."""
    video_frames: int = 0
    """How many of the images are frames of videos."""

    @property
    def mode(self) -> InputMode:
        """The mode, which depends on the media alone."""
        return InputMode(bool(self.images) * InputMode.VISION + bool(self.audios) * InputMode.SPEECH)


def _digest(*arrays: np.ndarray) -> bytes:
    content = hashlib.blake2b(digest_size=16)
    for array in arrays:
        content.update(repr(array.shape).encode())
        content.update(np.ascontiguousarray(array))
    return content.digest()
