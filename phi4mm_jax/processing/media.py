"""Fetches the bytes of a picture or a recording from wherever the user keeps them."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import math
import os
import urllib.parse
import urllib.request
from pathlib import Path

from phi4mm_jax.processing.display import shorten
from phi4mm_jax.processing.prompt import MediaError
from phi4mm_jax.processing.web import TooLargeError, WebError, download

_NAME_LENGTH = 200
"""Characters of a source that messages show."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What pictures, recordings and videos may cost."""

    max_bytes: int = 200_000_000
    """Largest file or download."""
    timeout_s: float = 30.0
    """Longest download, where a server that stays silent for 10 s is given up earlier; and longest decoding of a
    video."""
    max_pixels: int = 178_956_970
    """Largest picture or frame, as its header declares it; Pillow itself refuses more than this default."""
    max_audio_seconds: float = 10_485.0
    """Longest recording; 131072 tokens of 80 ms are as much as the model's context holds. One of more than 48 kHz may
    hold as many samples as one of 48 kHz."""
    max_frames: int = 8
    """Most frames that a video is taken as; of a video of fewer seconds, one a second."""
    max_media: int = 1000
    """Most pictures, recordings and videos of one conversation."""
    total_s: float = math.inf
    """Seconds after which no further medium of a conversation is begun."""
    local_files: bool = True
    """Whether paths and file:// URLs may be read; a public server should say no, or name a directory."""
    directory: Path | None = None
    """The directory under which local files must really lie, whatever links and `..` say; None for any."""
    private_hosts: bool = True
    """Whether URLs may lead to this machine and its private networks; a public server must say no. Without, the
    environment's proxies are not used."""


def describe(source: object) -> str:
    """Returns a short name of a source for error messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{memoryview(source).nbytes} bytes"
    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)
        if name[:5].lower() == "data:":
            name = name.partition(",")[0] + ",..."
        return shorten(name, _NAME_LENGTH) or "''"
    return type(source).__name__


def read(
    source: str | os.PathLike | bytes | bytearray | memoryview,
    limits: MediaLimits,
    accepted: str = "a path, a URL or bytes",
) -> bytes:
    """Reads a path, a file://, http(s):// or data: URL; bytes are returned as they are.

    Args:
      source: where the content is.
      limits: what it may cost.
      accepted: what the caller takes, for the message about a source of another type.

    Raises:
      MediaError: nothing there, too large, too slow, or of a kind that is not accepted.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        if len(data) > limits.max_bytes:
            raise _too_large(source, limits)
    elif isinstance(source, str) and (scheme := source[:8].partition(":")[0].lower()) in ("data", "http", "https"):
        data = _from_data_url(source, limits) if scheme == "data" else _from_web(source, limits)
    elif isinstance(source, (str, os.PathLike)):
        data = _from_file(source, limits)
    else:
        raise MediaError(f"{describe(source)}: expected {accepted}")
    if not data:
        raise MediaError(f"{describe(source)}: is empty")
    return data


def decode_base64(text: str, limits: MediaLimits, name: str = "base64 data") -> bytes:
    """Decodes base64; line breaks and spaces are tolerated, anything else is an error."""
    if len(text) * 3 // 4 > limits.max_bytes:
        raise _too_large(name, limits)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise MediaError(f"{name}: not valid base64") from None


def _too_large(source: object, limits: MediaLimits) -> MediaError:
    return MediaError(f"{describe(source)}: larger than the limit of {limits.max_bytes / 1e6:g} MB")


def _from_data_url(url: str, limits: MediaLimits) -> bytes:
    header, comma, payload = url.partition(",")
    if not comma:
        raise MediaError(f"{describe(url)}: expected data:[type][;base64],content")
    if header.lower().endswith(";base64"):
        return decode_base64(urllib.parse.unquote(payload), limits, describe(url))
    try:
        data = urllib.parse.unquote_to_bytes(payload)
    except UnicodeEncodeError:
        raise MediaError(f"{describe(url)}: holds lone surrogates, which are not Unicode characters") from None
    if len(data) > limits.max_bytes:
        raise _too_large(url, limits)
    return data


def _from_file(source: str | os.PathLike, limits: MediaLimits) -> bytes:
    name = os.fspath(source)
    if not limits.local_files:
        raise MediaError(f"{describe(source)}: local files are not allowed here; give an http(s) or data: URL")
    if isinstance(name, str) and name[:5].lower() == "file:":
        try:
            parts = urllib.parse.urlsplit(name)
        except ValueError as error:
            raise MediaError(f"{describe(source)}: not a valid URL ({error})") from None
        if parts.netloc not in ("", "localhost"):
            raise MediaError(f"{describe(source)}: a file:// URL must be of this machine, as file:///path")
        name = urllib.request.url2pathname(parts.path)
    elif isinstance(name, str) and "://" in name[:20]:
        raise MediaError(f"{describe(source)}: unknown kind of URL; accepted: http, https, file, data")
    path = Path(os.fsdecode(name))
    if limits.directory is not None:
        path = _within(limits.directory, path, source)
    try:
        if not path.is_file():
            raise MediaError(f"{describe(source)}: {'not a regular file' if path.exists() else 'no such file'}")
        if path.stat().st_size > limits.max_bytes:
            raise _too_large(source, limits)
        return path.read_bytes()
    except OSError as error:
        raise MediaError(f"{describe(source)}: cannot be read ({error.strerror})") from None


def _within(directory: Path, path: Path, source: object) -> Path:
    """Returns where a path really leads, if that is under a directory; what lies elsewhere is not even looked for."""
    try:
        real = Path(os.path.realpath(path))
    except ValueError:  # it holds a null character
        raise MediaError(f"{describe(source)}: no such file") from None
    if not real.is_relative_to(os.path.realpath(directory)):
        raise MediaError(f"{describe(source)}: lies elsewhere; accepted: files under {directory}")
    return real


def _from_web(url: str, limits: MediaLimits) -> bytes:
    try:
        return download(url, max_bytes=limits.max_bytes, timeout_s=limits.timeout_s, private_hosts=limits.private_hosts)
    except TooLargeError:
        raise _too_large(url, limits) from None
    except WebError as error:
        raise MediaError(f"{describe(url)}: {error}") from None
