"""Fetches the bytes of a picture or a recording from wherever the user keeps them."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from phi4mm_jax.processing.display import shorten
from phi4mm_jax.processing.prompt import MediaError

_CHUNK = 1 << 16
_NAME_LENGTH = 200
"""Characters of a source that messages show."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """What one picture or recording may cost."""

    max_bytes: int = 200_000_000
    """Largest file or download."""
    timeout_s: float = 30.0
    """Longest download; a server that stays silent for 10 s is given up earlier."""
    max_pixels: int = 178_956_970
    """Largest picture, as its header declares it; Pillow itself refuses more than this default."""
    max_audio_seconds: float = 10_485.0
    """Longest recording; 131072 tokens of 80 ms are as much as the model's context holds."""
    local_files: bool = True
    """Whether paths and file:// URLs may be read; a public server should say no."""


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
    try:
        if not path.is_file():
            raise MediaError(f"{describe(source)}: {'not a regular file' if path.exists() else 'no such file'}")
        if path.stat().st_size > limits.max_bytes:
            raise _too_large(source, limits)
        return path.read_bytes()
    except OSError as error:
        raise MediaError(f"{describe(source)}: cannot be read ({error.strerror})") from None


def _web_opener() -> urllib.request.OpenerDirector:
    """Returns an opener of http and https only, redirects included; urllib's own would follow one to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
        urllib.request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _from_web(url: str, limits: MediaLimits) -> bytes:
    """Downloads `url`; each read returns what has come, so that a trickle cannot outlive the time limit."""
    deadline = time.monotonic() + limits.timeout_s
    try:
        request_url = urllib.parse.quote(url, safe="!#$%&'()*+,/:;=?@[]~")  # a pasted URL may hold spaces or letters
        request = urllib.request.Request(request_url, headers={"User-Agent": "phi4mm_jax"})
        with _web_opener().open(request, timeout=min(10.0, limits.timeout_s)) as response:
            if int(response.headers.get("Content-Length") or 0) > limits.max_bytes:
                raise _too_large(url, limits)
            data = bytearray()
            while chunk := response.read1(_CHUNK):
                data += chunk
                if len(data) > limits.max_bytes:
                    raise _too_large(url, limits)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"more than {limits.timeout_s:g} s")
            if response.length:  # what Content-Length promised and did not come
                raise http.client.IncompleteRead(b"", response.length)
            return bytes(data)
    except urllib.error.HTTPError as error:
        error.close()
        reason: object = f"HTTP {error.code} {error.reason}"
    except urllib.error.URLError as error:
        reason = getattr(error.reason, "strerror", None) or error.reason
    except MediaError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error
    raise MediaError(f"{describe(url)}: cannot be fetched ({shorten(reason)})")
