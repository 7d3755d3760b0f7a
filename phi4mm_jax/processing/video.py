"""Videos to a few pictures, taken evenly over their time.

The packets tell how long a video is, and which of them hold a frame; its header is trusted with nothing but a promise
that there is no more than that. Sound is left out.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from phi4mm_jax.processing.display import shorten
from phi4mm_jax.processing.images import ImageSource, check_pixels, load_image
from phi4mm_jax.processing.media import MediaLimits, describe, read
from phi4mm_jax.processing.prompt import MediaError

if TYPE_CHECKING:
    import av
    from av.container import InputContainer

VIDEO_SOURCES = "a path, a URL, bytes, a list of pictures or an array [N, H, W, 3]"
VideoSource = str | os.PathLike | bytes | Sequence[ImageSource] | np.ndarray
"""A path, a URL, the bytes of a file, or its frames: a list of what `load_image` takes, or an array [N, H, W, 3]."""

_FORMATS = "mov,matroska,mpegts,mpeg,ogg,gif"
"""Demuxers that are used. Some others of FFmpeg open what a file names, such as the parts of a playlist, or take memory
as a damaged header says (AVI)."""
_CODECS = "h264,hevc,vp8,vp9,libdav1d,libaom-av1,av1,mpeg1video,mpeg2video,mpeg4,mjpeg,theora,h263,gif"
"""Decoders that are used."""
_ACCEPTED = "accepted: MP4, MOV, WebM, Matroska, MPEG, Ogg, GIF"
_QUARTERS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
"""What turns a picture counterclockwise."""


def load_video(source: VideoSource, limits: MediaLimits) -> list[Image.Image]:
    """Takes `limits.max_frames` frames of a video, or one a second of a shorter one, as RGB pictures.

    They are those that show in the middle of equal spans of its time, a frame that stands longer only once, turned
    upright. More frames than that, of a list or an array, are thinned evenly.

    Raises:
      MediaError: not a video, damaged or truncated, without frames, of more pixels than the limit, or it takes longer
        to decode than `limits.timeout_s`; or the package that decodes videos is not installed.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 4:
            raise MediaError(f"video array of shape {source.shape}; expected [N, H, W, 3]")
        source = list(source)
    if not isinstance(source, (list, tuple)):
        return _from_file(source, limits)
    if not source:
        raise MediaError("video: holds no frames")
    frames = []
    for i in _middles(len(source), min(len(source), limits.max_frames)):
        try:
            frames.append(load_image(source[int(i)], limits))
        except MediaError as error:
            raise MediaError(f"frame {int(i)}: {error}") from error
    return frames


def _middles(length: float, count: int) -> np.ndarray:  # [count]
    """The middles of equal spans of a length."""
    return (np.arange(count) + 0.5) * (length / count)


# --- files ---------------------------------------------------------------------------------------------------


class _Clock:
    """The time that decoding may take."""

    def __init__(self, seconds: float):
        self._seconds, self._deadline = seconds, time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self._deadline:
            raise MediaError(f"video takes longer to decode than the limit of {self._seconds:g} s")


def _from_file(source: str | os.PathLike | bytes, limits: MediaLimits) -> list[Image.Image]:
    name = describe(source)
    try:
        import av
    except ImportError:
        raise MediaError(f'{name}: videos need another package: pip install "phi4mm-jax[video]"') from None
    data = read(source, limits, VIDEO_SOURCES)
    options = {"format_whitelist": _FORMATS, "codec_whitelist": _CODECS, "protocol_whitelist": ""}
    options["max_pixels"] = str(limits.max_pixels)  # for decoders: a frame may be larger than the header says
    try:
        with av.open(io.BytesIO(data), options=options) as container:
            return _sampled(container, limits)
    except MediaError as error:
        raise MediaError(f"{name}: {error}") from None
    except (av.FFmpegError, UnicodeDecodeError) as error:  # the latter of foreign metadata, up to PyAV 18
        reason = shorten(getattr(error, "strerror", None) or error)
        what = f"not a video, damaged, or with a frame of more than {limits.max_pixels} pixels"
        raise MediaError(f"{name}: {what} ({reason}); {_ACCEPTED}") from None


def _sampled(container: InputContainer, limits: MediaLimits) -> list[Image.Image]:
    clock = _Clock(limits.timeout_s)
    stream = next(iter(container.streams.video), None)
    if stream is None:
        raise MediaError(f"holds no pictures; {_ACCEPTED}")
    codec = stream.codec_context
    if codec is None or codec.name not in _CODECS.split(","):
        raise MediaError(f"video of the codec {codec and codec.name} is not supported; {_ACCEPTED}")
    if not codec.width * codec.height:  # where FFmpeg was kept from looking at a frame
        raise MediaError(f"video has frames of no pixels, or of more than the limit of {limits.max_pixels} pixels")
    check_pixels((codec.width, codec.height), "video", limits)
    codec.options = {"max_pixels": str(limits.max_pixels)}
    groups = _groups(container, stream, clock)
    wanted = _wanted([_time(p) for group in groups for p in group], float(stream.time_base), limits.max_frames)
    frames: dict[int, Image.Image] = {}
    for group in groups:
        targets = sorted(wanted.intersection(map(_time, group)))
        frames |= {t: _picture(frame, limits) for t, frame in _nearest(codec, group, targets, clock).items()}
    if not frames:
        raise MediaError("video holds no frames that can be decoded")
    return [frames[t] for t in sorted(frames)]


def _time(packet: av.Packet) -> int:
    """When a packet's frame is shown, in units of its stream."""
    return packet.dts if packet.pts is None else packet.pts


def _groups(container: InputContainer, stream: av.VideoStream, clock: _Clock) -> list[list[av.Packet]]:
    """The packets of a stream, parted before those that can be decoded without the ones before.

    Raises:
      MediaError: there are none, or they end before the header says.
    """
    groups: list[list[av.Packet]] = []
    end = 0.0
    for packet in _packets(container):
        clock.check()
        if not packet.size or _time(packet) is None:
            continue
        end = max(end, float((_time(packet) + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index == stream.index:
            if packet.is_keyframe or not groups:
                groups.append([])
            groups[-1].append(packet)
    if not groups:
        raise MediaError("video holds no frames")
    promised = (container.duration or 0) / 1e6
    start = (container.start_time or 0) / 1e6
    if end - start < 0.9 * promised - 1.0:
        raise MediaError(f"video is truncated; it ends after {end - start:.3g} s, its header says {promised:.3g} s")
    return groups


def _packets(container: InputContainer) -> Iterator[av.Packet]:
    try:
        yield from container.demux()
    except IndexError:  # PyAV stumbles over streams that turned up amid the file, at the end
        pass


def _wanted(times: list[int], unit: float, max_frames: int) -> set[int]:
    """Of the times at which frames appear, those of the frames to take."""
    shown = sorted(set(times))
    begins = np.array([t - shown[0] for t in shown], np.float64)
    length = begins[-1] + (np.median(np.diff(begins)) if len(shown) > 1 else 0.0)  # the last one stands, too
    count = int(np.clip(round(length * unit), 1, max_frames))
    return {shown[i] for i in np.searchsorted(begins, _middles(length, count), side="right") - 1}


def _nearest(
    codec: av.VideoCodecContext, packets: list[av.Packet], targets: list[int], clock: _Clock
) -> dict[int, av.VideoFrame]:
    """Decodes a group until its last target; of each target the frame that is nearest in time."""
    nearest: dict[int, av.VideoFrame] = {}
    for frame in _decoded(codec, packets) if targets else ():
        clock.check()
        if frame.pts is None:
            continue
        for t in targets:
            if t not in nearest or abs(frame.pts - t) < abs(nearest[t].pts - t):
                nearest[t] = frame
        if frame.pts >= targets[-1]:
            break
    return nearest


def _decoded(codec: av.VideoCodecContext, packets: list[av.Packet]) -> Iterator[av.VideoFrame]:
    """Frames in the order in which they are shown; the decoder begins anew."""
    codec.flush_buffers()
    for packet in (*packets, None):  # the end brings out what the decoder holds back
        yield from codec.decode(packet)


def _picture(frame: av.VideoFrame, limits: MediaLimits) -> Image.Image:
    check_pixels((frame.width, frame.height), "video", limits)
    image = frame.to_image()
    turn = _QUARTERS.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)
