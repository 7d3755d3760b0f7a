import dataclasses
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.processing.images import (
    image_features,
    load_image,
    patch_position_ids,
    plan_crops,
    token_layout,
)
from phi4mm_jax.processing.media import MediaLimits
from phi4mm_jax.processing.prompt import ROW_SEPARATOR, VIEW_SEPARATOR, ImageFeatures, MediaError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiles_to_picture(features: ImageFeatures, height: int, width: int) -> np.ndarray:
    """Puts the tiles back together and undoes the normalisation: [height, width, 3] uint8."""
    side = features.crops.shape[-1]
    tiles = features.crops[1:].reshape(height // side, width // side, 3, side, side).transpose(0, 3, 1, 4, 2)
    return np.rint((tiles.reshape(height, width, 3) + 1) * 127.5).astype(np.uint8)


# --- the preprocessing against independent values ------------------------------------------------------------


@pytest.mark.parametrize("name", ["enlarged", "reduced", "tall"])
def test_features_equal_the_slow_reference(golden: Path, config: ModelConfig, limits: MediaLimits, name: str) -> None:
    expected = np.load(golden / "processing_images.npz")
    features = image_features(load_image(expected[f"{name}_image"], limits), config.vision)
    padded = expected[f"{name}_padded"]
    np.testing.assert_array_equal(tiles_to_picture(features, *padded.shape[:2]), padded)
    np.testing.assert_allclose(features.crops[0], expected[f"{name}_global"], atol=2e-6)
    np.testing.assert_array_equal(features.mask, expected[f"{name}_mask"])
    np.testing.assert_array_equal(features.layout, expected[f"{name}_layout"])
    assert features.crops.dtype == np.float32 and features.layout.dtype == np.int32
    assert features.num_tokens == len(expected[f"{name}_layout"])


def test_plans_equal_the_slow_reference(golden: Path, released: ModelConfig) -> None:
    table = np.load(golden / "processing_plans.npz")
    for (width, height), expected in zip(table["sizes"].tolist(), table["plans"].tolist(), strict=True):
        plan = plan_crops(width, height, released.vision)
        masked = plan.columns * 32 - plan.visible_columns, plan.rows * 32 - plan.visible_rows
        tokens = len(token_layout(plan, 16))
        assert [plan.columns, plan.rows, plan.width, plan.height, *masked, tokens] == expected, (width, height)


def test_position_ids_are_floors_but_for_four_roundings() -> None:
    low = {(24, 3), (24, 6), (24, 9), (20, 10)}
    for n in range(1, 33):
        mask = np.zeros((1, 32, 32), bool)
        mask[0, :n, : n // 2 + 1] = True
        rows = [32 * i // n - ((n, i) in low) for i in range(n)]
        columns = [32 * i // (n // 2 + 1) - ((n // 2 + 1, i) in low) for i in range(n // 2 + 1)]
        ids = patch_position_ids(mask).reshape(32, 32)
        np.testing.assert_array_equal(ids[:n, : n // 2 + 1], 32 * np.array(rows)[:, None] + columns)
        assert not ids[n:].any() and not ids[:, n // 2 + 1 :].any()


@pytest.mark.parametrize("size, tokens", [((448, 448), 545), ((1344, 896), 1841), ((2688, 2688), 9585)])
def test_documented_token_counts(released: ModelConfig, size: tuple[int, int], tokens: int) -> None:
    layout = token_layout(plan_crops(*size, released.vision), 16)
    assert len(layout) == tokens
    assert (layout == VIEW_SEPARATOR).sum() == 1 and layout[-1] == ROW_SEPARATOR
    used = layout[layout >= 0]
    np.testing.assert_array_equal(np.sort(used), np.arange(len(used)))  # without padding each feature is used once


@pytest.mark.parametrize("name", "abcd")
def test_oracle_tiny(oracle: Path, limits: MediaLimits, name: str) -> None:
    config = ModelConfig.from_checkpoint(oracle / "ckpt_hub").vision
    expected = np.load(oracle / "data" / "image_preprocess_tiny.npz")
    features = image_features(load_image(oracle / "images" / f"{name}.png", limits), config)
    np.testing.assert_array_equal(features.crops[1:], expected[f"{name}_crops"][1:])
    np.testing.assert_allclose(features.crops[0], expected[f"{name}_crops"][0], atol=1e-6)
    np.testing.assert_array_equal(features.mask, expected[f"{name}_mask"])
    assert features.num_tokens == expected[f"{name}_num_tokens"]


@pytest.mark.parametrize("name", ["a", "c", "big"])
def test_oracle_448(oracle: Path, released: ModelConfig, limits: MediaLimits, name: str) -> None:
    expected = np.load(oracle / "data" / "image_preprocess_448.npz")
    features = image_features(load_image(oracle / "images" / f"{name}.png", limits), released.vision)
    padded = expected[f"{name}_padded_uint8"]
    np.testing.assert_array_equal(tiles_to_picture(features, *padded.shape[:2]), padded)
    view = features.crops[0]
    np.testing.assert_allclose(view[:, ::8, ::8], expected[f"{name}_global_every8"], atol=1e-6)
    np.testing.assert_allclose(view[:, 0], expected[f"{name}_global_row0"], atol=1e-6)
    np.testing.assert_allclose(view[:, 447], expected[f"{name}_global_row447"], atol=1e-6)
    np.testing.assert_array_equal(features.mask, expected[f"{name}_mask"])
    assert features.num_tokens == expected[f"{name}_num_tokens"]


def test_oracle_plans(oracle: Path, released: ModelConfig) -> None:
    table = np.load(oracle / "data" / "hd_plan_table.npz")
    expected = table["plan_gw_gh_nw_nh_pw_ph_ntok"][:, [0, 1, 2, 3, 6]].tolist()
    for size, row in zip(table["wh"].tolist(), expected, strict=True):
        plan = plan_crops(*size, released.vision)
        assert [plan.columns, plan.rows, plan.width, plan.height, len(token_layout(plan, 16))] == row, size


def test_oracle_position_ids(oracle: Path) -> None:
    table = np.load(oracle / "data" / "navit_buckets_32.npz")["original"]
    for n in range(1, 33):
        mask = np.zeros((1, 32, 32), bool)
        mask[0, :n] = True
        np.testing.assert_array_equal(patch_position_ids(mask).reshape(32, 32)[:n, 0] // 32, table[n, :n])
    batch = np.load(oracle / "data" / "vision.npz")
    masks = batch["image_attention_mask"].reshape(-1, 8, 8).astype(bool)
    np.testing.assert_array_equal(patch_position_ids(masks), batch["position_ids"])


# --- opening -------------------------------------------------------------------------------------------------


def test_alpha_of_files_is_laid_on_white(limits: MediaLimits, tmp_path: Path) -> None:
    hidden_black = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    hidden_black.save(tmp_path / "a.png")
    for source in (encoded(hidden_black), tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").as_uri()):
        assert np.asarray(load_image(source, limits)).min() == 255
    half = encoded(Image.new("RGBA", (20, 20), (0, 0, 0, 128)))
    assert np.asarray(load_image(half, limits))[0, 0].tolist() == [127, 127, 127]
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 4), dtype=np.uint8)
    noise[..., 3] = 255
    opaque = encoded(Image.fromarray(noise))
    np.testing.assert_array_equal(np.asarray(load_image(opaque, limits)), noise[..., :3])
    grey = Image.new("LA", (20, 20), (0, 0))
    assert np.asarray(load_image(encoded(grey), limits)).min() == 255


def test_alpha_of_images_and_arrays_is_dropped(limits: MediaLimits) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 4), dtype=np.uint8)
    for source in (noise, Image.fromarray(noise), Image.open(io.BytesIO(encoded(Image.fromarray(noise))))):
        np.testing.assert_array_equal(np.asarray(load_image(source, limits)), noise[..., :3])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBa", "CMYK", "YCbCr", "HSV", "I", "I;16", "F"])
def test_images_are_converted_as_in_the_original(limits: MediaLimits, mode: str) -> None:
    if mode in ("I", "I;16", "F"):
        deep = np.arange(400).reshape(20, 20) * 100
        image = Image.fromarray(deep.astype({"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]))
    else:
        noise = np.random.default_rng(0).integers(0, 256, (20, 20, 4), dtype=np.uint8)
        image = Image.fromarray(noise)
        for step in {"PA": ("P", "PA"), "RGBa": ("RGBa",)}.get(mode, ("RGB", mode)):
            image = image.convert(step)
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(load_image(image, limits)), np.asarray(image.convert("RGB")))


def test_transparent_palette(limits: MediaLimits) -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([255, 0, 0, 0, 0, 0])
    assert np.asarray(load_image(encoded(image), limits)).max() == 0
    assert np.asarray(load_image(encoded(image, transparency=1), limits)).min() == 255


@pytest.mark.parametrize("dtype, top", [(np.uint16, 65535), (np.int32, 65535), (np.int32, 255), (np.float32, 1.0)])
def test_deep_grey_is_scaled(limits: MediaLimits, dtype: type, top: float) -> None:
    ramp = np.tile(np.linspace(0, top, 64).astype(dtype), (64, 1))
    got = np.asarray(load_image(encoded(Image.fromarray(ramp), "TIFF"), limits))
    np.testing.assert_allclose(got[0, :, 0], np.linspace(0, 255, 64), atol=1)


def test_grey_that_cannot_be_scaled(limits: MediaLimits) -> None:
    with pytest.raises(MediaError, match="mode F"):
        load_image(encoded(Image.fromarray(np.full((20, 20), np.nan, np.float32)), "TIFF"), limits)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "P"])
def test_other_modes(limits: MediaLimits, mode: str) -> None:
    image = Image.new("RGB", (20, 20), "white").convert(mode)
    assert np.asarray(load_image(image, limits)).min() == 255


def test_files_are_turned_upright_but_images_are_not(limits: MediaLimits) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)
    assert load_image(data, limits).size == (20, 30)
    assert load_image(Image.open(io.BytesIO(data)), limits).size == (30, 20)


def test_animation_gives_its_first_frame(limits: MediaLimits) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(data, limits))[0, 0].tolist() == [255, 0, 0]


def test_arrays(limits: MediaLimits) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(load_image(pixels, limits)), pixels)
    np.testing.assert_array_equal(np.asarray(load_image(pixels / 255.0, limits)), pixels)
    np.testing.assert_array_equal(np.asarray(load_image(pixels[..., :1], limits))[..., 1], pixels[..., 0])
    np.testing.assert_array_equal(np.asarray(load_image(pixels[..., 0], limits))[..., 2], pixels[..., 0])


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((3, 20, 20), np.uint8), r"shape \(3, 20, 20\); expected"),
        (np.zeros((20,), np.uint8), "expected"),
        (np.zeros((0, 20), np.uint8), "no pixels"),
        (np.full((20, 20), 255.0), "outside 0 to 1"),
        (np.full((20, 20), np.nan), "outside 0 to 1"),
        (np.zeros((20, 20), np.int64), "int64; expected uint8"),
    ],
)
def test_arrays_that_are_no_pictures(limits: MediaLimits, array: np.ndarray, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        load_image(array, limits)


def test_other_types_are_refused(limits: MediaLimits) -> None:
    with pytest.raises(MediaError, match=r"^list: expected a path, a URL, bytes, a PIL image or an array$"):
        load_image([[0, 1]], limits)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_half_a_file_is_an_error(limits: MediaLimits, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    assert load_image(data, limits).size == (64, 64)
    with pytest.raises(MediaError):
        load_image(data[: len(data) // 2], limits)


def test_pixels_are_limited_before_decoding() -> None:
    limits = MediaLimits(max_pixels=100)
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    for source in (bomb, encoded(Image.new("RGB", (11, 10))), Image.new("RGB", (11, 10)), np.zeros((11, 10), np.uint8)):
        with pytest.raises(MediaError, match="limit of 100"):
            load_image(source, limits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        large = encoded(Image.new("1", (10_000, 9_000)))  # Pillow would warn of it
        assert load_image(large, MediaLimits()).size == (10_000, 9_000)


def declaring(width: int, height: int, kind: str) -> bytes:
    """A small file whose header declares a picture of that size."""
    options = {"lossless": True} if kind == "WEBP" else {}
    data = bytearray(encoded(Image.new("P" if kind == "GIF" else "RGB", (10, 10)), kind, **options))
    if kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "GIF":
        at = data.index(b",", 13) + 5
        data[at : at + 4] = struct.pack("<HH", width, height)  # of the frame, which reaches beyond the screen
    elif kind == "WEBP":
        at = data.index(b"/", 20) + 1
        data[at : at + 4] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    elif kind == "TIFF":
        (directory,) = struct.unpack_from("<I", data, 4)
        for entry in range(directory + 2, directory + 2 + 12 * data[directory], 12):
            (tag,) = struct.unpack_from("<H", data, entry)
            if tag in (256, 257):
                struct.pack_into("<HII", data, entry + 2, 4, 1, width if tag == 256 else height)
    elif kind == "BMP":
        struct.pack_into("<ii", data, 18, width, height)
    return bytes(data)


@pytest.mark.parametrize(
    "kind, side",
    [
        *(("PNG", 2**31 - 1), ("GIF", 65_535), ("TIFF", 2**31 - 1), ("BMP", 2**31 - 1), ("WEBP", 16_383)),
        *((kind, 5_000) for kind in ("PNG", "GIF", "TIFF", "BMP", "WEBP")),  # which Pillow itself would take
    ],
)
def test_bombs_are_not_decoded(monkeypatch: pytest.MonkeyPatch, kind: str, side: int) -> None:
    assert load_image(declaring(10, 10, kind), MediaLimits()).size == (10, 10)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("is decoded"))
    with pytest.raises(MediaError, match="limit of 1000000"):
        load_image(declaring(side, side, kind), MediaLimits(max_pixels=1_000_000))


def test_metadata_bombs() -> None:
    picture = encoded(Image.new("RGB", (10, 10)))
    for kind in (b"zTXt", b"iCCP"):
        body = kind + b"a\0\0" + zlib.compress(bytes(100_000_000))
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        with pytest.raises(MediaError, match="not an image, or damaged"):
            load_image(picture[:33] + chunk + picture[33:], MediaLimits())


@pytest.mark.parametrize("size", [(6000, 2), (1, 300)])
def test_too_long_and_thin(released: ModelConfig, size: tuple[int, int]) -> None:
    with pytest.raises(MediaError, match="too long and thin"):
        image_features(Image.new("RGB", size), released.vision)


def test_one_pixel(config: ModelConfig) -> None:
    features = image_features(Image.new("RGB", (1, 1)), config.vision)
    assert features.crops.shape == (2, 3, 56, 56) and features.mask.all()


UNREADABLE = {
    "bomb_30000x30000.png": "limit of",
    "empty.jpg": "is empty",
    "truncated.jpg": "not an image, or damaged",
    "truncated_half.jpg": "truncated",
}


def test_every_picture_of_the_collection(media: Path, released: ModelConfig, limits: MediaLimits) -> None:
    for path in sorted((media / "image").iterdir()):
        if path.name in UNREADABLE:
            with pytest.raises(MediaError, match=UNREADABLE[path.name]):
                load_image(path, limits)
        else:
            vision = dataclasses.replace(released.vision, max_crops=4)
            features = image_features(load_image(path, limits), vision)
            assert np.isfinite(features.crops).all() and features.num_tokens > 257


def test_difficult_pictures(media: Path, limits: MediaLimits) -> None:
    def pixels(name: str) -> np.ndarray:
        return np.asarray(load_image(media / "image" / name, limits)).astype(int)

    ramp = pixels("grey16.png")[0, :, 0]
    assert ramp[0] < 5 and ramp[-1] > 250 and abs(ramp[128] - 128) < 5
    text = pixels("rgba_text_on_transparent.png")
    assert text.min() < 20 and (text > 250).mean() > 0.8
    red, green, _ = pixels("cmyk.jpg").reshape(-1, 3).T
    assert ((red > 150) & (green < 100)).mean() > 0.05
    assert pixels("exif_landscape_6.jpg").shape == (1200, 1800, 3)
    assert pixels("animated.gif").shape == (25, 14, 3)
