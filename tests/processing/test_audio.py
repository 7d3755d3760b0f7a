import io
import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.processing import audio
from phi4mm_jax.processing.audio import audio_features, load_audio, log_mel, mel_matrix, resample
from phi4mm_jax.processing.media import MediaLimits
from phi4mm_jax.processing.prompt import MediaError


def tone(seconds: float, rate: int, frequency: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def noise(seconds: float, rate: int = 16_000) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, int(seconds * rate)).astype(np.float32)


# --- features against independent values ---------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_features_equal_the_slow_reference(golden: Path, config: ModelConfig, limits: MediaLimits, rate: int) -> None:
    expected = np.load(golden / "processing_audio.npz")
    clip = load_audio((expected[f"samples_{rate}"], rate), limits)
    features = audio_features(*clip, config.audio)
    # the package rounds frames and spectra to float32, as the original does
    np.testing.assert_allclose(features.features, expected[f"log_mel_{rate}"], atol=2e-4)
    assert features.features.dtype == np.float32
    assert features.num_tokens == 2  # of 13 frames


@pytest.mark.parametrize("name", ["w16a", "w16b", "w8", "w48", "w16stereo"])
def test_oracle_features(oracle: Path, config: ModelConfig, limits: MediaLimits, name: str) -> None:
    data = np.load(oracle / "data" / "audio_features.npz")
    clip = load_audio((data[f"{name}_int16"], int(data[f"{name}_rate"])), limits)
    features = audio_features(*clip, config.audio)
    np.testing.assert_allclose(features.features, data[f"{name}_logmel"], atol=1e-5)
    assert features.num_tokens == data[f"{name}_num_tokens"]


def test_oracle_mel_matrix(oracle: Path) -> None:
    np.testing.assert_array_equal(mel_matrix(80), np.load(oracle / "data" / "audio_features.npz")["mel_matrix"])


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, fast = noise(0.5), noise(0.5, 48_000)
    whole, whole_fast = log_mel(samples, 16_000, 80), resample(fast, 48_000)[0]
    monkeypatch.setattr(audio, "_BLOCK", 7)
    np.testing.assert_allclose(log_mel(samples, 16_000, 80), whole, atol=1e-5)
    np.testing.assert_allclose(resample(fast, 48_000)[0], whole_fast, atol=1e-6)


@pytest.mark.parametrize("seconds, tokens", [(1.0, 13), (30.0, 375), (40.0, 500)])
def test_documented_token_counts(config: ModelConfig, seconds: float, tokens: int) -> None:
    assert audio_features(np.zeros(int(16_000 * seconds), np.float32), 16_000, config.audio).num_tokens == tokens


@pytest.mark.parametrize("rate", [8001, 11_025, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000])
def test_resampling_keeps_pitch_and_duration(rate: int) -> None:
    samples, new_rate = resample(tone(1.0, rate), rate)
    assert new_rate == 16_000 and abs(len(samples) - 16_000) <= 1
    assert np.abs(samples[1000:15_000] - tone(1.0, 16_000)[1000:15_000]).max() < 2e-3


def test_silence_is_zero(config: ModelConfig) -> None:
    assert not audio_features(np.zeros(16_000, np.float32), 16_000, config.audio).features.any()


# --- decoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, subtype, tolerance",
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 0),
        ("WAV", "ULAW", 0.02),
        ("FLAC", None, 1e-4),
        ("AIFF", None, 1e-4),
        ("OGG", "VORBIS", 0.1),
        ("OGG", "OPUS", 0.1),
        ("MP3", None, 0.1),
    ],
)
def test_codecs(limits: MediaLimits, kind: str, subtype: str | None, tolerance: float) -> None:
    samples = tone(1.0, 16_000)
    got, rate = load_audio(encoded(samples, 16_000, kind, subtype), limits)
    assert rate == 16_000 and got.dtype == np.float32
    assert abs(len(got) - 16_000) < 2000
    assert np.abs(got[4000:12_000] - samples[4000:12_000]).max() <= tolerance


def test_channels_are_averaged(limits: MediaLimits) -> None:
    stereo = np.stack([tone(0.1, 16_000), np.zeros(1600, np.float32)], axis=1)
    expected = tone(0.1, 16_000) / 2
    for source in ((stereo, 16_000), encoded(stereo, 16_000, subtype="FLOAT")):
        np.testing.assert_allclose(load_audio(source, limits)[0], expected, atol=1e-7)


@pytest.mark.parametrize("dtype, scale, offset", [("int16", 2**15, 0), ("int32", 2**31, 0), ("uint8", 128, 128)])
def test_integer_samples(limits: MediaLimits, dtype: str, scale: int, offset: int) -> None:
    samples = np.array([-0.5, 0.0, 0.25, 0.5] * 100)
    got, _ = load_audio(((samples * scale + offset).astype(dtype), 16_000), limits)
    np.testing.assert_allclose(got, samples, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_float_samples_are_taken_as_they_are(limits: MediaLimits, dtype: str) -> None:
    samples = np.array([-0.5, 0.25, 2.0, -3.5] * 100, dtype)  # loud, and no error
    np.testing.assert_array_equal(load_audio((samples, 16_000.0), limits)[0], samples)
    assert load_audio(([0, 0.5] * 500, np.int64(16_000)), limits)[0][1] == 0.5


@pytest.mark.parametrize(
    "source, message",
    [
        ((np.zeros(0, np.float32), 16_000), "no samples"),
        ((np.array([0.0, np.nan] * 500), 16_000), "not finite"),
        ((np.array([0.0, np.inf] * 500), 16_000), "expected -1 to 1"),
        ((np.full(500, 3000.0), 16_000), r"reach 3e\+03; expected -1 to 1, at most 16"),
        (([0, 1000, -1000] * 500, 16_000), "of type int64; give uint8, int16 or int32 samples, or floats from -1 to 1"),
        ((np.zeros(500, np.uint16), 16_000), "of type uint16; give"),
        ((["a"] * 500, 16_000), "of type <U1; give"),
        ((np.zeros((2, 16_000), np.float32), 16_000), r"expected \[samples\] or \[samples, channels\]"),
        ((np.zeros(500, bool), 16_000), "of type bool; give"),
        ((16_000, np.zeros(500)), r"^sample rate array.*; expected a whole number of Hz, 8000 to 384000$"),
        ((np.zeros(500), 0), "sample rate 0; expected a whole number"),
        ((np.zeros(500), True), "sample rate True; expected a whole number"),
        ((np.zeros(500), float("nan")), "sample rate nan; expected"),
        ((np.zeros(500), 16_000.5), r"sample rate 16000\.5; expected"),
        ((np.zeros(500), 10**400), r"sample rate 10+\.\.\.0+; expected"),
        ((np.zeros(500), "16000"), "sample rate '16000'; expected"),
        ((np.zeros(500),), r"tuple of 1; expected a path, a URL, bytes or \(samples, rate\)"),
        ([np.zeros(500), 16_000], r"^list: expected a path, a URL, bytes or \(samples, rate\)$"),
        (([0.0, [1.0]], 16_000), "do not form an array"),
        (np.zeros(500), "needs its sample rate"),
        (b"", "is empty"),
        (b"no audio " * 50, "not an audio file"),
        (b"\0\0\0\x20ftypM4A " + bytes(100), "MP4/M4A"),
        (b"\x1a\x45\xdf\xa3" + bytes(100), "Matroska"),
        (encoded(np.zeros(0), 16_000), "no samples"),
        (encoded(noise(1.0), 16_000)[:20_000], "truncated"),
        (encoded(noise(1.0), 16_000, "AIFF")[:20_000], "truncated"),
        (encoded(noise(1.0), 16_000, "FLAC")[:20_000], "damaged|truncated"),
        (7, "expected a path"),
    ],
)
def test_sources_that_are_no_recordings(limits: MediaLimits, source: object, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        load_audio(source, limits)


def test_a_live_recording_does_not_know_its_length(limits: MediaLimits) -> None:
    data = bytearray(encoded(noise(1.0), 16_000))
    data[4:8] = data[40:44] = struct.pack("<I", 0xFFFFFFFF)
    assert len(load_audio(bytes(data), limits)[0]) == 16_000


def test_duration_is_limited() -> None:
    limits = MediaLimits(max_audio_seconds=0.5)
    for source in (encoded(noise(1.0), 16_000), (noise(1.0), 16_000)):
        with pytest.raises(MediaError, match=r"limit of 0\.5 s"):
            load_audio(source, limits)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "AIFF", "OGG", "MP3"])
def test_hours_are_not_decoded(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    data = encoded(np.zeros(16_000 * 90, np.float32), 16_000, kind)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("is decoded"))
    with pytest.raises(MediaError, match="longer than the limit of 60 s"):
        load_audio(data, MediaLimits(max_audio_seconds=60))


@pytest.mark.parametrize("seconds", [7_200, 2**36 // 16_000])
def test_a_header_that_promises_hours(limits: MediaLimits, seconds: int) -> None:
    flac = bytearray(encoded(noise(1.0), 16_000, "FLAC"))
    flac[18:26] = (int.from_bytes(flac[18:26]) >> 36 << 36 | seconds * 16_000).to_bytes(8)  # its count of samples
    wav = bytearray(encoded(noise(1.0), 16_000))
    wav[40:44] = struct.pack("<I", min(seconds * 32_000, 0x7FFFEFFF))
    for data in (flac, wav):
        tracemalloc.start()
        with pytest.raises(MediaError, match="truncated|damaged|limit"):
            load_audio(bytes(data), limits)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
        tracemalloc.stop()


@pytest.mark.parametrize(
    "samples, rate, message",
    [(399, 16_000, "too short"), (199, 8000, "too short"), (9, 48_000, "too short"), (9000, 4000, "8000 to 384000")],
)
def test_features_that_cannot_be_computed(config: ModelConfig, samples: int, rate: int, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        audio_features(np.zeros(samples, np.float32), rate, config.audio)


UNUSABLE = {
    "librivox_10s.m4a": "MP4/M4A",
    "librivox_10s.mp4": "MP4/M4A",
    "words_one.mp4": "MP4/M4A",
    "not_audio.wav": "not an audio file",
    "tiny_10ms.wav": "too short",
    "truncated.wav": "truncated",
    "zero_samples.wav": "no samples",
}


def test_every_recording_of_the_collection(media: Path, config: ModelConfig, limits: MediaLimits) -> None:
    entries = json.loads((media / "manifest.json").read_text())["files"]
    durations = {Path(e["file"]).name: e.get("duration_s") for e in entries}
    for path in sorted([*(media / "audio").iterdir(), *(media / "video").iterdir()]):
        if path.name in UNUSABLE:
            with pytest.raises(MediaError, match=UNUSABLE[path.name]):
                audio_features(*load_audio(path, limits), config.audio)
        else:
            features = audio_features(*load_audio(path, limits), config.audio)
            assert features.num_tokens == pytest.approx(durations[path.name] / 0.08, abs=2)
            assert np.isfinite(features.features).all()


def test_one_clip_in_four_forms(media: Path, config: ModelConfig, limits: MediaLimits) -> None:
    """The same speech gives nearly the same features whatever the container and rate."""
    names = ["jfk_16k.wav", "jfk.flac", "jfk.mp3", "jfk.opus"]
    clips = [audio_features(*load_audio(media / "audio" / n, limits), config.audio).features for n in names]
    for clip in clips[1:]:
        assert np.abs(clip[:, :60] - clips[0][:, :60]).mean() < 1.0
