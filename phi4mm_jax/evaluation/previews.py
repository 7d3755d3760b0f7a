"""Small copies of pictures and recordings that a page can hold in itself."""

from __future__ import annotations

import base64
import dataclasses
import io

import soundfile
from PIL import Image

from phi4mm_jax.evaluation.items import Item
from phi4mm_jax.processing.audio import AudioSource, load_audio, resample
from phi4mm_jax.processing.images import ImageSource, load_image
from phi4mm_jax.processing.media import MediaLimits
from phi4mm_jax.processing.prompt import MediaError

_SIDE = 900
"""Pixels of the longer side of a picture."""
_QUALITY = 70
_SECONDS = 30
"""Of a recording that are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """A picture or a recording, or why there is none."""

    kind: str
    """ "image" or "audio"."""
    url: str = ""
    """All of it, as data: URL; empty if there is none."""
    note: str = ""
    """What it is, or why there is none."""


class Previews:
    """Makes previews until so many bytes are spent."""

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes
        self._limits = MediaLimits()

    def of(self, item: Item) -> list[Preview]:
        """Previews of the media of an item, in order; those of what cannot be read say why."""
        pictures = [self._preview("image", "image/webp", source) for source in item.images]
        return pictures + [self._preview("audio", "audio/mpeg", source) for source in item.audios]

    def _preview(self, kind: str, mime: str, source: ImageSource | AudioSource) -> Preview:
        try:
            data, note = (_picture if kind == "image" else _sound)(source, self._limits)
        except MediaError as error:
            return Preview(kind=kind, note=str(error))
        url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        if len(url) > self._left:
            return Preview(kind=kind, note=f"{note}; not shown, to keep this page small")
        self._left -= len(url)
        return Preview(kind=kind, url=url, note=note)


def _picture(source: ImageSource, limits: MediaLimits) -> tuple[bytes, str]:
    image = load_image(source, limits)
    note = f"{image.width} × {image.height} pixels"
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=_QUALITY)
    return file.getvalue(), note


def _sound(source: AudioSource, limits: MediaLimits) -> tuple[bytes, str]:
    samples, rate = load_audio(source, limits)
    note = f"{len(samples) / rate:.1f} s"
    if len(samples) > _SECONDS * rate:
        samples, note = samples[: _SECONDS * rate], f"the first {_SECONDS} s of {note}"
    samples, rate = resample(samples, rate)
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="MP3")  # every browser plays it
    return file.getvalue(), note
