"""Recordings to log-mel features (phi4mm-reference, section 5.1).

One deviation from the original: it resamples by dropping to the next integer ratio, which plays 44.1 kHz at the wrong
speed. Here rates that are no multiple of 16 kHz are resampled properly; multiples follow the original exactly.
"""

from __future__ import annotations

import functools
import io
import numbers
import os
import re
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.lib.stride_tricks import sliding_window_view

from phi4mm_jax.config import AudioConfig
from phi4mm_jax.processing.display import quote, shorten
from phi4mm_jax.processing.media import MediaLimits, describe, read
from phi4mm_jax.processing.prompt import AudioFeatures, MediaError

AUDIO_SOURCES = "a path, a URL, bytes or (samples, rate)"
AudioSource = str | os.PathLike | bytes | tuple[np.ndarray, int]
"""A path, a URL, the bytes of a file, or (samples, rate)."""

_CODECS = "accepted: WAV, FLAC, MP3, Ogg Vorbis, Opus, AIFF"
_RATE = 16_000
"""What audio is brought to, in Hz."""
_MAX_RATE = 384_000
"""Highest rate that is accepted, in Hz."""
_USUAL_RATE = 48_000
"""Highest rate of which a recording may be as long as the limits say, in Hz: samples cost memory, not seconds."""
_FRAMINGS = {16_000: (400, 160, 512), 8_000: (200, 80, 256)}
"""Window, hop and FFT length in samples, by rate."""
_BLOCK = 4096
"""Frames per step: a long recording is never framed as a whole."""
_DECODE_BLOCK = 1 << 14
"""Samples of all channels per step of decoding."""
_MAX_AMPLITUDE = 16.0
"""Loud floats and overshoots of decoders stay far below; what is above is on another scale, such as that of int16."""
_INTEGERS = {"uint8": (128, 2.0**7), "int16": (0, 2.0**15), "int32": (0, 2.0**31)}
"""Zero and full scale of the sample types of WAV files; others do not tell theirs: int64 often holds 16-bit samples."""


def load_audio(source: AudioSource, limits: MediaLimits) -> tuple[np.ndarray, int]:
    """Decodes a recording and mixes it down to one channel.

    Args:
      source: a file in any form that `media.read` takes, or (samples, rate) with samples [n] or [n, channels]: uint8,
        int16 or int32 at full scale, or floats from -1 to 1, which are taken as they are.
      limits: size and duration that are accepted.

    Returns:
      [n] float32 samples from -1 to 1, and their rate in Hz.

    Raises:
      MediaError: not audio, of an unsupported codec, truncated, empty, too long, or with samples that are not finite.
    """
    if isinstance(source, tuple):
        name, (samples, rate) = "(samples, rate)", _from_array(source, limits)
    elif isinstance(source, np.ndarray):
        raise MediaError(f"an array needs its sample rate; expected {AUDIO_SOURCES}")
    else:
        name, (samples, rate) = describe(source), _decode(read(source, limits, AUDIO_SOURCES), describe(source), limits)
    if not len(samples):
        raise MediaError(f"{name}: holds no samples")
    if not np.isfinite(samples).all():
        raise MediaError(f"{name}: holds samples that are not finite")
    return samples, rate


def audio_features(samples: np.ndarray, rate: int, config: AudioConfig) -> AudioFeatures:
    """Computes the features of a recording.

    Args:
      samples: [n] float, from -1 to 1.
      rate: in Hz, from 8000.
      config: the encoder that takes them.

    Raises:
      MediaError: the rate is not accepted, or there is less than one analysis window of 25 ms.
    """
    resampled, model_rate = resample(samples, rate)
    if len(resampled) < _FRAMINGS[model_rate][0]:
        raise MediaError(f"audio of {1000 * len(samples) / rate:.3g} ms is too short; at least 25 ms are needed")
    features = log_mel(resampled, model_rate, config.input_size)
    return AudioFeatures(features, config.num_tokens(len(features)))


def resample(samples: np.ndarray, rate: int) -> tuple[np.ndarray, int]:
    """Brings samples to a rate that features are defined for: 8 kHz stays, everything else becomes 16 kHz.

    Raises:
      MediaError: the rate is below 8 kHz or absurdly high.
    """
    rate = _checked_rate(rate)
    if rate in _FRAMINGS:
        return samples, rate
    if rate % _RATE == 0:
        return _decimate(samples, rate // _RATE), _RATE
    return soxr.resample(samples, rate, _RATE), _RATE


def log_mel(
    samples: np.ndarray,  # [n]
    rate: int,
    num_mels: int,
) -> np.ndarray:  # [frames, num_mels] float32
    """Natural logarithm of the mel energies, floored at 0; 8 kHz audio has no energy in the upper half."""
    window, hop, fft = _FRAMINGS[rate]
    frames = sliding_window_view(samples, window)[::hop]
    taper = np.hamming(window)
    mel = mel_matrix(num_mels)[: fft // 2 if rate < _RATE else None]  # at 8 kHz the Nyquist bin is dropped too
    out = np.empty((len(frames), num_mels), np.float32)
    for start in range(0, len(frames), _BLOCK):
        frame = frames[start : start + _BLOCK].astype(np.float32)
        previous = np.concatenate([frame[:, :1], frame[:, :-1]], axis=1)
        spectrum = np.fft.rfft(taper * ((frame - 0.97 * previous) * 32768), n=fft)[:, : len(mel)]
        power = np.abs(spectrum.astype(np.complex64)) ** 2
        out[start : start + _BLOCK] = np.log(np.maximum(power @ mel, 1.0))
    return out


@functools.cache
def mel_matrix(num_mels: int) -> np.ndarray:
    """Returns [257, num_mels] float32: triangles of unit height, equally spaced in mel from 0 to 7690 Hz."""
    frequency = np.arange(257) * (_RATE / 512)
    bins = 1127.0 * np.log(1.0 + frequency / 700.0)
    low, high = 0.0, 1127.0 * np.log(1.0 + 7690.0 / 700.0)
    spacing = (high - low) / (num_mels + 1)
    centres = np.linspace(low, high, num_mels + 2)[1:-1]
    matrix = np.maximum(1.0 - np.abs(centres - bins[:, None]) / spacing, 0.0)
    matrix[0] = matrix[246:] = 0.0  # the original leaves out bin 0 and the bins from 7690 Hz on, rounded
    return matrix.astype(np.float32)


def _decimate(samples: np.ndarray, factor: int) -> np.ndarray:
    """Keeps each `factor`-th sample of a low-passed signal.

    The filter is a sinc under a Kaiser window (beta 5) that reaches over ten output samples on each side; zeros stand
    beyond the ends. The original has it from `scipy.signal.resample_poly`.
    """
    half = 10 * factor
    taps = np.sinc(np.arange(-half, half + 1) / factor) * np.kaiser(2 * half + 1, 5.0)
    taps /= taps.sum()
    windows = sliding_window_view(np.pad(samples, half), len(taps))[::factor]
    blocks = [windows[i : i + _BLOCK] @ taps for i in range(0, len(windows), _BLOCK)]
    return np.concatenate(blocks).astype(np.float32)


def _from_array(source: tuple, limits: MediaLimits) -> tuple[np.ndarray, int]:
    if len(source) != 2:
        raise MediaError(f"tuple of {len(source)}; expected {AUDIO_SOURCES}")
    rate = _checked_rate(source[1])
    try:
        samples = np.asarray(source[0])
    except (TypeError, ValueError):
        raise MediaError("audio samples do not form an array; expected [samples] or [samples, channels]") from None
    shape = samples.shape
    samples = np.squeeze(samples) if samples.size > 1 else samples.reshape(-1)
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[0] < samples.shape[1]):
        raise MediaError(f"audio samples have shape {shape}; expected [samples] or [samples, channels]")
    if len(samples) > limits.max_audio_seconds * rate:
        raise _too_long("(samples, rate)", limits.max_audio_seconds)
    if samples.dtype.name in _INTEGERS:
        zero, full_scale = _INTEGERS[samples.dtype.name]
        samples = (samples.astype(np.float64) - zero) / full_scale
    elif not np.issubdtype(samples.dtype, np.floating):
        kind = shorten(samples.dtype)
        raise MediaError(f"audio samples of type {kind}; give uint8, int16 or int32 samples, or floats from -1 to 1")
    elif samples.size and (peak := np.abs(samples).max()) > _MAX_AMPLITUDE:
        raise MediaError(f"float audio samples reach {peak:.3g}; expected -1 to 1, at most {_MAX_AMPLITUDE:g}")
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    return mono.astype(np.float32), rate


def _checked_rate(rate: Any) -> int:
    is_number = isinstance(rate, numbers.Real) and not isinstance(rate, bool)
    if not is_number or not min(_FRAMINGS) <= rate <= _MAX_RATE or rate != int(rate):  # NaN is in no range
        raise MediaError(f"sample rate {quote(rate)}; expected a whole number of Hz, {min(_FRAMINGS)} to {_MAX_RATE}")
    return int(rate)


def _too_long(name: str, seconds: float) -> MediaError:
    return MediaError(f"{name}: audio is longer than the limit of {seconds:g} s")


def _decode(data: bytes, name: str, limits: MediaLimits) -> tuple[np.ndarray, int]:
    """Decodes a file in blocks, so that neither many channels nor a false header cost more than the limits allow."""
    blocks, count = [], 0
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, promised, log = _checked_rate(file.samplerate), file.frames, file.extra_info
            limit = limits.max_audio_seconds * min(rate, _USUAL_RATE)
            estimated = file.format == "MP3" and not re.search(rb"Xing|Info|VBRI", data[:4096])
            if not estimated and promised > limit:
                raise _too_long(name, limit / rate)
            while len(block := file.read(_DECODE_BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block.mean(axis=1))
                count += len(block)
                if count > limit:
                    raise _too_long(name, limit / rate)
    except soundfile.SoundFileError as error:
        raise MediaError(f"{name}: {_diagnosis(data, error)}") from None
    if (not estimated and count < promised) or _lacks_samples(log):
        raise MediaError(f"{name}: audio is truncated; it ends after {count / rate:.3g} s, before its header says")
    return np.concatenate(blocks) if blocks else np.empty(0, np.float32), rate


def _lacks_samples(log: str) -> bool:
    """Whether libsndfile noted that the samples of a WAV or AIFF end early; live recordings promise 2 GB or more."""
    note = re.search(r"^ ?(?:data|SSND) : (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    return note is not None and int(note[2]) < int(note[1]) < 0x7FFFF000


def _diagnosis(data: bytes, error: soundfile.SoundFileError) -> str:
    """Says in one line why libsndfile could not decode `data`."""
    if data[4:8] == b"ftyp":
        return f"MP4/M4A (AAC) audio is not supported; {_CODECS}"
    if data[:4] == b"\x1a\x45\xdf\xa3":
        return f"Matroska/WebM audio is not supported; {_CODECS}"
    reason = getattr(error, "error_string", str(error)).strip().rstrip(".")
    if reason == "Format not recognised":
        return f"not an audio file that can be read; {_CODECS}"
    return f"audio is damaged or of an unsupported codec ({reason}); {_CODECS}"
