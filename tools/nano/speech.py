"""Synthetic speech by the C libraries of eSpeak NG and Flite, and the recordings made of it.

The same arguments give the same samples, whatever was spoken before. No process is started: an utterance takes a few
milliseconds.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soxr

# --- voices --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Voice:
    """Who speaks."""

    engine: str
    """"espeak" or "flite"."""
    name: str
    """An accent of espeak such as "en-gb-scotland", or a voice of flite such as "awb"."""
    variant: str = ""
    """How espeak's accent sounds: a file of its voices/!v, whose letter case counts."""

    def __str__(self) -> str:
        return f"{self.engine} {self.name}" + (f"+{self.variant}" if self.variant else "")


# Without m4, m6, f3 and f5, which only NEW_VOICES have.
_VARIANTS = ("m1", "f1", "m2", "f2", "m3", "f4", "m5", "m7")
_ESPEAK = {
    "en-us": (*_VARIANTS, "Mike", "Alex", "linda", "Annie"),
    "en-gb": (*_VARIANTS, "max", "john", "belinda", "robert"),
    "en-gb-scotland": _VARIANTS[::2],
    "en-gb-x-rp": _VARIANTS[1::2],
    "en-gb-x-gbclan": _VARIANTS[:4],
    "en-gb-x-gbcwmd": _VARIANTS[4:],
    "en-029": _VARIANTS[::2],
    "en-us-nyc": _VARIANTS[1::2],
}

VOICES = (
    *(Voice("espeak", accent, variant) for accent, variants in _ESPEAK.items() for variant in variants),
    *(Voice("flite", name) for name in ("kal16", "awb", "rms")),
)
"""The voices of training."""

NEW_VOICES = (
    Voice("espeak", "en-us", "m4"),
    Voice("espeak", "en-us", "f3"),
    Voice("espeak", "en-gb", "f5"),
    Voice("espeak", "en-gb", "m6"),
    Voice("flite", "slt"),
)
"""Voices for the evaluation: neither they nor their variants are in training."""


def synthesize(text: str, voice: Voice, words_per_minute: int, pitch: int) -> tuple[np.ndarray, int]:
    """Speaks a text.

    Args:
      text: English words.
      voice: who speaks.
      words_per_minute: nominal rate as espeak counts it, from 80; short words come faster.
      pitch: from 0 to 99; 50 is the voice's own, and 0 up to an octave lower. The rms of flite keeps its own.

    Returns:
      [samples] float32 from -1 to 1, and their rate in Hz.

    Raises:
      RuntimeError: a library or the voice is not installed.
    """
    speak = {"espeak": _espeak, "flite": _flite}[voice.engine]
    with _LOCK:
        _LIBC.srand(1)  # both make breath and other noise of rand()
        samples, rate = speak(text.encode(), voice, words_per_minute, pitch)
    return np.frombuffer(samples, np.int16).astype(np.float32) / 2**15, rate


def record(text: str, rng: np.random.Generator, voices: Sequence[Voice]) -> tuple[np.ndarray, int]:
    """Speaks a text as one of the voices, at a drawn rate, pitch and loudness, in a drawn room with its noise.

    Args:
      text: English words.
      rng: decides everything.
      voices: who may speak; three of four are of espeak, where both engines are there.

    Returns:
      [samples] float32 from -1 to 1, and their rate in Hz: mostly 16 000, at times 8 000 or 44 100.
    """
    engine = "espeak" if rng.random() < 0.75 else "flite"
    candidates = [voice for voice in voices if voice.engine == engine] or voices
    voice = candidates[rng.integers(len(candidates))]
    samples, spoken_rate = synthesize(text, voice, int(rng.integers(130, 211)), int(rng.integers(30, 71)))
    rate = int(rng.choice((8_000, 44_100))) if rng.random() < 0.15 else 16_000
    samples = soxr.resample(samples, spoken_rate, rate)
    lead, trail = rng.uniform(0.05, 0.3, 2)
    clip = np.pad(samples, (int(lead * rate), int(trail * rate)))
    if rng.random() < 0.3:
        clip = _reverberate(clip, rate, rng)
    if rng.random() < 0.6:
        level = np.sqrt(np.mean(samples**2)) * 10 ** (-rng.uniform(8, 35) / 20)
        clip = clip + level * _noise(len(clip), rate, rng)
    peak = np.exp(rng.uniform(np.log(0.05), np.log(0.95)))
    return (clip * (peak / np.abs(clip).max())).astype(np.float32), rate


def _reverberate(clip: np.ndarray, rate: int, rng: np.random.Generator) -> np.ndarray:
    """Adds the echoes of a room, which fall by 60 dB within 0.1 to 0.5 s, 4 to 14 dB below the direct sound."""
    duration = rng.uniform(0.1, 0.5)
    echoes = rng.standard_normal(int(duration * rate)) * np.logspace(0, -3, int(duration * rate))
    echoes[0] = 0
    echoes *= 10 ** (-rng.uniform(4, 14) / 20) / np.sqrt(np.sum(echoes**2))
    echoes[0] = 1
    size = 1 << (len(clip) + len(echoes) - 1).bit_length()  # others may be slow to transform
    return np.fft.irfft(np.fft.rfft(clip, size) * np.fft.rfft(echoes, size))[: len(clip)]


def _noise(count: int, rate: int, rng: np.random.Generator) -> np.ndarray:
    """[count] white, pink or brown noise with an RMS of 1."""
    slope = rng.choice((0.0, 0.5, 1.0))
    size = 1 << (count - 1).bit_length()
    frequencies = np.maximum(np.fft.rfftfreq(size, 1 / rate), 20)  # below is not heard, but would take all the power
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(size)) * frequencies**-slope)[:count]
    return noise / np.sqrt(np.mean(noise**2))


_LOCK = threading.Lock()  # neither library can be used by two threads
_LIBC = ctypes.CDLL(None)


def _load(name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise RuntimeError(f"speech needs the Debian packages espeak-ng and flite: {error}") from error


# --- espeak --------------------------------------------------------------------------------------------------

_SYNCHRONOUS, _BUFFER_MS = 2, 1000
_RATE, _PITCH = 1, 3
_CHARACTERS, _UTF8 = 1, 1
_LANGUAGE_FILES = {"en-gb": "en"}  # espeak finds the others by their own names

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


class _EspeakVoice(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("languages", ctypes.c_char_p), ("identifier", ctypes.c_char_p)]


def _espeak(text: bytes, voice: Voice, words_per_minute: int, pitch: int) -> tuple[bytes, int]:
    parts = []

    @_Callback
    def collect(samples: int | None, count: int, _events: int) -> int:
        if samples:
            parts.append(ctypes.string_at(samples, 2 * count))
        return 0

    # The wobble of the pitch and the filters go on from one utterance to the next in static variables, which no call
    # resets. Loading the library anew does, in a millisecond.
    library = _load("libespeak-ng.so.1")
    library.espeak_GetCurrentVoice.restype = ctypes.POINTER(_EspeakVoice)
    try:
        rate = library.espeak_Initialize(_SYNCHRONOUS, _BUFFER_MS, None, 0)
        name = f"{_LANGUAGE_FILES.get(voice.name, voice.name)}+{voice.variant}"
        failed = rate <= 0 or library.espeak_SetVoiceByName(name.encode())
        # An unknown variant is no error of espeak: it speaks without.
        if failed or not library.espeak_GetCurrentVoice()[0].identifier.endswith(f"+{voice.variant}".encode()):
            raise RuntimeError(f"no voice {voice}: speech needs the Debian packages espeak-ng and flite")
        library.espeak_SetSynthCallback(collect)
        library.espeak_SetParameter(_RATE, words_per_minute, 0)
        library.espeak_SetParameter(_PITCH, pitch, 0)
        size = ctypes.c_size_t(len(text) + 1)
        if library.espeak_Synth(text, size, 0, _CHARACTERS, 0, _UTF8, None, None):
            raise RuntimeError(f"{voice} cannot say {text!r}")
    finally:
        library.espeak_Terminate()
        _LIBC.dlclose(ctypes.c_void_p(library._handle))
    return b"".join(parts), rate


# --- flite ---------------------------------------------------------------------------------------------------

# What makes each voice as fast as espeak at the same words per minute.
_STRETCH = {"kal16": 187, "awb": 168, "rms": 150, "slt": 172}
_STRETCH_FEATURE, _SHIFT_FEATURE = b"duration_stretch", b"f0_shift"  # kept: flite does not copy the names


class _FliteVoice(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("features", ctypes.c_void_p)]


class _Wave(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_char_p),
        ("rate", ctypes.c_int),
        ("count", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("samples", ctypes.c_void_p),
    ]


@functools.cache
def _flite_voice(name: str) -> tuple[ctypes.CDLL, ctypes._Pointer]:
    library, voice = _load("libflite.so.1"), _load(f"libflite_cmu_us_{name}.so.1")
    library.flite_init()
    library.flite_text_to_wave.restype = ctypes.POINTER(_Wave)
    library.flite_feat_set_float.argtypes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float
    register = voice[f"register_cmu_us_{name}"]
    register.restype = ctypes.POINTER(_FliteVoice)
    return library, register(None)


def _flite(text: bytes, voice: Voice, words_per_minute: int, pitch: int) -> tuple[bytes, int]:
    library, speaker = _flite_voice(voice.name)
    features = speaker[0].features
    library.flite_feat_set_float(features, _STRETCH_FEATURE, _STRETCH[voice.name] / words_per_minute)
    library.flite_feat_set_float(features, _SHIFT_FEATURE, 2 ** ((pitch - 50) / 50))
    wave = library.flite_text_to_wave(text, speaker)
    samples, rate = ctypes.string_at(wave[0].samples, 2 * wave[0].count), wave[0].rate
    library.delete_wave(wave)
    return samples, rate
