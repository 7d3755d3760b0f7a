"""Videos made here: each second has its colour, so that a frame tells when it is from."""

import io
import itertools
import struct
import sys
import types
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from phi4mm_jax.processing import video
from phi4mm_jax.processing.media import MediaLimits
from phi4mm_jax.processing.prompt import MediaError
from phi4mm_jax.processing.video import load_video

RATE = 10
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), (250, 250, 250)]


def colour(second: int) -> tuple[int, int, int]:
    """Differs from those before and after."""
    return COLOURS[second % len(COLOURS)]


def picture(second: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    return np.full((*size[::-1], 3), colour(second), np.uint8)


def encode(
    frames: Sequence[tuple[int, np.ndarray]],
    *,
    form: str = "mp4",
    codec: str = "mpeg4",
    seekable: bool = True,
    **options: str,
) -> bytes:
    """A file of (time in tenths of a second, picture)."""
    buffer = io.BytesIO()
    with av.open(buffer if seekable else _Pipe(buffer), "w", format=form) as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.height, stream.width, _ = frames[0][1].shape
        for at, pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


class _Pipe:
    """A file that only knows how to be written."""

    def __init__(self, buffer: io.BytesIO) -> None:
        self.write = buffer.write


def seconds(count: float, first: int = 0) -> list[tuple[int, np.ndarray]]:
    return [(i, picture(first + i // RATE)) for i in range(int(count * RATE))]


def shown(frames: list[Image.Image]) -> list[tuple[int, int, int]]:
    """The nearest of the colours, in the middle of each frame."""
    centres = [np.array(frame.getpixel((frame.width // 2, frame.height // 2)), int) for frame in frames]
    return [min(COLOURS, key=lambda c, centre=centre: np.abs(centre - c).sum()) for centre in centres]


@pytest.mark.parametrize(
    "form, codec",
    [
        *(("mp4", "mpeg4"), ("mov", "mjpeg"), ("matroska", "mpeg4"), ("mpegts", "mpeg2video")),
    ],
)
@pytest.mark.parametrize("options", [{}, {"g": "4", "bf": "0"}])
def test_frames_are_taken_evenly(limits: MediaLimits, form: str, codec: str, options: dict) -> None:
    frames = load_video(encode(seconds(8), form=form, codec=codec, **options), limits)
    assert shown(frames) == [colour(i) for i in range(8)]
    assert all(frame.mode == "RGB" and frame.size == (64, 48) for frame in frames)


def test_frames_that_lie_between_others(limits: MediaLimits) -> None:
    """With B-frames the packets are not in the order of time."""
    data = encode(seconds(12), bf="2", g="9")
    assert shown(load_video(data, MediaLimits(max_frames=12))) == [colour(i) for i in range(12)]
    assert shown(load_video(data, MediaLimits(max_frames=4))) == [colour(i) for i in (1, 4, 7, 10)]


@pytest.mark.parametrize("form, codec", [("webm", "libvpx-vp9"), ("mp4", "libx264"), ("mp4", "libsvtav1")])
def test_codecs_of_the_web(limits: MediaLimits, form: str, codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"no {codec} to make a video")
    assert shown(load_video(encode(seconds(8), form=form, codec=codec), limits)) == [colour(i) for i in range(8)]


@pytest.mark.parametrize(
    "count, expected", [(3.0, [0, 1, 2]), (1.0, [0]), (0.1, [0]), (16.0, [1, 3, 5, 7, 9, 11, 13, 15])]
)
def test_how_many(limits: MediaLimits, count: float, expected: list[int]) -> None:
    assert shown(load_video(encode(seconds(count)), limits)) == [colour(i) for i in expected]


def test_rates_may_vary(limits: MediaLimits) -> None:
    """Five seconds at ten frames a second, then five of one frame, then two at ten: time counts and not frames."""
    frames = [*seconds(5), (50, picture(5))] + [(100 + i, picture(6)) for i in range(20)]
    taken = load_video(encode(frames, form="matroska"), MediaLimits(max_frames=6))
    assert shown(taken) == [colour(i) for i in (1, 3, 5, 6)]  # at 1, 3, 5, 7, 9 and 11 s, of which three are one


def test_a_recording_under_way_has_no_duration(limits: MediaLimits) -> None:
    data = encode(seconds(4), form="matroska", seekable=False)
    with av.open(io.BytesIO(data)) as container:
        assert container.duration is None
    assert shown(load_video(data, limits)) == [colour(i) for i in range(4)]


def test_headers_do_not_count(limits: MediaLimits) -> None:
    data = bytearray(encode(seconds(4)))
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
        struct.pack_into(">I", data, data.index(box) + offset, 2**31 - 1)
    assert shown(load_video(bytes(data), limits)) == [colour(i) for i in range(4)]


@pytest.mark.parametrize(
    "turn, matrix",
    [(90, (0, 1, 0, -1, 0, 0)), (180, (-1, 0, 0, 0, -1, 0)), (270, (0, -1, 0, 1, 0, 0)), (0, (1, 0, 0, 0, 1, 0))],
)
def test_frames_are_turned_upright(limits: MediaLimits, turn: int, matrix: tuple) -> None:
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 255  # top left
    data = bytearray(encode([(0, pixels)]))
    struct.pack_into(">6i", data, data.index(b"tkhd") + 44, *(65536 * value for value in matrix))
    (frame,) = load_video(bytes(data), limits)
    expected = Image.fromarray(pixels).rotate(-turn, expand=True)  # clockwise, as the matrix says
    assert frame.size == expected.size
    assert np.abs(np.asarray(frame).astype(int) - np.asarray(expected)).mean() < 8


def test_animations(limits: MediaLimits) -> None:
    pictures = [Image.fromarray(picture(i)) for i in range(3)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=1000)
    assert shown(load_video(buffer.getvalue(), limits)) == [colour(i) for i in range(3)]


def test_frames_themselves(limits: MediaLimits, tmp_path) -> None:
    pictures = [picture(i) for i in range(5)]
    Image.fromarray(pictures[1]).save(tmp_path / "1.png")
    mixed = [pictures[0], tmp_path / "1.png", Image.fromarray(pictures[2])]
    assert shown(load_video(mixed, limits)) == [colour(i) for i in range(3)]
    for source in (np.stack(pictures), tuple(pictures)):
        np.testing.assert_array_equal(np.stack(load_video(source, limits)), np.stack(pictures))
    many = np.stack([picture(i) for i in range(7) for _ in range(4)])
    assert shown(load_video(many, MediaLimits(max_frames=7))) == COLOURS


@pytest.mark.parametrize(
    "source, message",
    [
        ([], "^video: holds no frames$"),
        (np.zeros((4, 4, 3), np.uint8), r"^video array of shape \(4, 4, 3\); expected \[N, H, W, 3\]$"),
        (np.zeros((2, 4, 4, 5), np.uint8), r"^frame 0: image array of shape \(4, 4, 5\)"),
        ([picture(0), "/no/such/file"], "^frame 1: /no/such/file: no such file$"),
        (3, "^int: expected a path, a URL, bytes, a list of pictures or an array"),
        ("/no/such/file.mp4", "^/no/such/file.mp4: no such file$"),
        (b"no video" * 100, "^800 bytes: not a video, damaged, or .*; accepted: MP4, MOV, WebM"),
    ],
)
def test_sources_that_are_no_videos(limits: MediaLimits, source: object, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        load_video(source, limits)


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {}\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        '<Representation id="1" bandwidth="1"><BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    ],
)
def test_playlists_open_nothing(limits: MediaLimits, tmp_path, playlist: str) -> None:
    (tmp_path / "a.ts").write_bytes(encode(seconds(1), form="mpegts", codec="mpeg2video"))
    for target in (tmp_path / "a.ts", (tmp_path / "a.ts").as_uri()):
        with pytest.raises(MediaError, match="not a video"):
            load_video(playlist.format(target).encode(), limits)


def test_sound_alone(limits: MediaLimits) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    with pytest.raises(MediaError, match="holds no pictures; accepted"):
        load_video(buffer.getvalue(), limits)


def test_other_codecs(limits: MediaLimits) -> None:
    with pytest.raises(MediaError, match="codec ffv1 is not supported; accepted"):
        load_video(encode(seconds(1), form="matroska", codec="ffv1"), limits)


@pytest.mark.parametrize("form", ["mp4", "matroska"])
def test_half_a_video(limits: MediaLimits, form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 48, 64, 3), np.uint8)
    data = encode(list(enumerate(noise)), form=form)
    with pytest.raises(MediaError, match="truncated; it ends after .* s, its header says|damaged"):
        load_video(data[: len(data) // 2], limits)


def test_pixels_are_limited(limits: MediaLimits) -> None:
    for form, codec in (("mp4", "mpeg4"), ("mov", "mjpeg"), ("matroska", "mpeg4"), ("mpegts", "mpeg2video")):
        with pytest.raises(MediaError, match="64x48 exceeds the limit of 1000|more than the limit of 1000 pixels"):
            load_video(encode(seconds(1), form=form, codec=codec), MediaLimits(max_pixels=1000))
    with pytest.raises(MediaError, match="frame 0: image array: image of 64x48 exceeds the limit of 1000 pixels"):
        load_video([picture(0)], MediaLimits(max_pixels=1000))


def test_frames_may_not_outgrow_the_header(limits: MediaLimits) -> None:
    """Small pictures first, as the header says, and then a large one."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for i in range(40):
            jpeg = io.BytesIO()
            Image.fromarray(picture(0, (64, 48) if i < 20 else (2000, 1000))).save(jpeg, "JPEG")
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, RATE)
            packet.is_keyframe = True
            container.mux(packet)
    assert [frame.size for frame in load_video(buffer.getvalue(), limits)] == [(64, 48)] * 2 + [(2000, 1000)] * 2
    with pytest.raises(MediaError, match="a frame of more than 1000000 pixels"):
        load_video(buffer.getvalue(), MediaLimits(max_pixels=1_000_000))


@pytest.mark.parametrize("length, stage", [(25, "decoding"), (100, "counting")])
def test_time_is_limited(limits: MediaLimits, monkeypatch: pytest.MonkeyPatch, length: int, stage: str) -> None:
    """By a clock that ticks whenever it is looked at."""
    data = encode(seconds(length / RATE), g="600")
    ticks = itertools.count()
    monkeypatch.setattr(video, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    decoded = []
    decode = video._decoded
    monkeypatch.setattr(video, "_decoded", lambda *args: (decoded.append(frame) or frame for frame in decode(*args)))
    with pytest.raises(MediaError, match="takes longer to decode than the limit of 30 s"):
        load_video(data, limits)
    assert bool(decoded) == (stage == "decoding")


def test_bytes_are_limited() -> None:
    with pytest.raises(MediaError, match="larger than the limit"):
        load_video(encode(seconds(1)), MediaLimits(max_bytes=100))


def test_damage_is_an_error_of_ours(limits: MediaLimits) -> None:
    generator = np.random.default_rng(0)
    for form in ("mp4", "matroska", "mpegts", "mpeg"):
        codec = "mpeg2video" if "mpeg" in form else "mpeg4"
        whole = np.frombuffer(encode(seconds(2), form=form, codec=codec), np.uint8)
        for share in (0.3, 0.03, 0.003, 0.001) * 10:
            data = whole.copy()
            hit = generator.random(len(data)) < share
            data[hit] = generator.integers(0, 256, hit.sum())
            try:
                assert 1 <= len(load_video(data.tobytes(), limits)) <= 8
            except MediaError as error:
                assert "\n" not in str(error)


def test_the_package_that_decodes_may_be_missing(limits: MediaLimits, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(seconds(1))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r'^a\.mp4: videos need another package: pip install "phi4mm-jax\[video\]"$'):
        load_video("a.mp4", limits)
    with pytest.raises(MediaError, match="another package"):
        load_video(data, limits)
    assert len(load_video([picture(0)], limits)) == 1
