"""The speech tower against the original, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phi4mm_jax.models.audio import LEAD

TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


def cut(clips, window=500):
    """The windows of clips of one request, as `AudioModel.encode` takes them; each clip has as many as the longest."""
    longest = max(map(len, clips))
    length = min(8 * window, -(-longest // 8) * 8)
    features, continues, frames, num_keys = [], [], [], []
    for clip in clips:
        own = -(-len(clip) // 8)
        padded = np.pad(clip, ((LEAD, 2 * length), (0, 0)))
        for start in range(0, longest, length):
            features.append(padded[start : start + LEAD + length])
            continues.append(start > 0)
            frames.append(longest - start)
            # The original masks nothing where a clip is alone: beyond one window its padding is seen, too.
            unmasked = len(clips) == 1 and longest > length
            num_keys.append(window if unmasked else np.clip(own - start // 8, 0, window))
    return np.stack(features), np.array(continues), np.array(frames, np.int32), np.array(num_keys, np.int32)


def join(x, clips):
    """Sub-frames of windows [W, T, D] as those of clips [B, ceil(frames / 8), D]."""
    return np.asarray(x).reshape(len(clips), -1, x.shape[-1])[:, : -(-max(map(len, clips)) // 8)]


def encode(tower, clips):
    return join(jax.jit(lambda *args: tower.encode(*args))(*cut(clips)), clips)


def project(tower, clips, projector):
    windows = cut(clips)
    with_image = np.full(len(windows[0]), projector == "vision")
    return join(jax.jit(lambda *args: tower(*args))(*windows, with_image), clips)


def hidden_states(tower, clips):
    """What subsampling gives and every layer's output."""

    @jax.jit
    def run(features, continues, frames, num_keys):
        x = (features - tower.mean.get_value()[None, None]) * tower.inv_std.get_value()[None, None]
        hidden = [tower.subsampling(x, continues, frames)]
        length = hidden[0].shape[1]
        keys = jnp.arange(length)[None, :] < num_keys[:, None]
        for layer in tower.layers:
            hidden.append(layer(hidden[-1], tower.position_bias(length), keys))
        return hidden

    return [join(x, clips) for x in run(*cut(clips))]


@pytest.fixture(scope="session")
def clips(processor, media):
    """Log-mel features of the golden clips."""
    paths = {name: media / f"{name}.wav" for name in ("clip", "short")}
    return {name: processor.raw("<|audio_1|>", audios=[path]).audios[0].features for name, path in paths.items()}


def test_every_layer_matches_the_original(model, golden, clips):
    for i, x in enumerate(hidden_states(model.audio, [clips["clip"]])):
        np.testing.assert_allclose(x, golden[f"audio/clip_hidden_{i}"], **TOLERANCE)


def test_a_clip_alone_and_a_masked_batch_match_the_original(model, golden, clips):
    np.testing.assert_allclose(encode(model.audio, [clips["clip"]]), golden["audio/clip_encoded"], **TOLERANCE)
    both = encode(model.audio, [clips["clip"], clips["short"]])
    np.testing.assert_allclose(both, golden["audio/both_encoded"], **TOLERANCE)


def test_more_than_one_window_matches_the_original(model, golden):
    """502 sub-frames are two windows; a lone clip sees the padding of its last window, clips of a batch do not."""
    long = golden["audio/long_features"].astype(np.float32)
    np.testing.assert_allclose(encode(model.audio, [long]), golden["audio/long_encoded"], **TOLERANCE)
    both = encode(model.audio, [long, long[1000:1900]])
    np.testing.assert_allclose(both, golden["audio/long_both_encoded"], **TOLERANCE)


@pytest.mark.parametrize("projector", ["speech", "vision"])
def test_projected_tokens_match_the_original(model, golden, clips, projector):
    alone = project(model.audio, [clips["clip"]], projector)
    np.testing.assert_allclose(alone, golden[f"audio/clip_{projector}_tokens"], **TOLERANCE)
    both = project(model.audio, [clips["clip"], clips["short"]], projector)
    np.testing.assert_allclose(both, golden[f"audio/both_{projector}_tokens"], **TOLERANCE)


def test_each_row_takes_its_own_projector(model, golden, clips):
    windows = [np.repeat(array, 2, axis=0) for array in cut([clips["clip"]])]
    tokens = jax.jit(lambda *args: model.audio(*args))(*windows, np.array([True, False]))
    np.testing.assert_allclose(tokens[0], golden["audio/clip_vision_tokens"][0], **TOLERANCE)
    np.testing.assert_allclose(tokens[1], golden["audio/clip_speech_tokens"][0], **TOLERANCE)


@pytest.mark.parametrize("more", [8, 40])
def test_padding_changes_nothing(model, golden, clips, more):
    """A bucket longer than the clip gives the clip's own result, to the last sub-frame, whatever the padding holds."""
    features, *rest = cut([clips["clip"]])
    features[:, :LEAD] = features[:, LEAD + len(clips["clip"]) :] = 3.0
    features = np.pad(features, ((0, 0), (0, more), (0, 0)), constant_values=3.0)
    encoded = join(jax.jit(lambda *args: model.audio.encode(*args))(features, *rest), [clips["clip"]])
    np.testing.assert_allclose(encoded, golden["audio/clip_encoded"], **TOLERANCE)


def test_oracle(oracle_loaded, oracle):
    tower = oracle_loaded[1].audio
    with np.load(oracle / "data" / "audio_encoder.npz") as arrays:
        expected = dict(arrays)
    with np.load(oracle / "data" / "audio_features.npz") as arrays:
        first, second = arrays["w16a_logmel"], arrays["w16b_logmel"]
    np.testing.assert_allclose(tower.position_bias(40), expected["relative_bias_40"], **TOLERANCE)
    hidden = hidden_states(tower, [first])
    for x, name in zip(hidden, ("subsampled", "layer0", "layer1", "layer2"), strict=True):
        np.testing.assert_allclose(x, expected[f"single_{name}"], **TOLERANCE)
    np.testing.assert_allclose(hidden[-1], expected["single_encoder_out"], **TOLERANCE)
    hidden = hidden_states(tower, [first, second])
    np.testing.assert_allclose(hidden[0], expected["batch_subsampled"], **TOLERANCE)
    np.testing.assert_allclose(hidden[-1], expected["batch_encoder_out"], **TOLERANCE)
    for projector in ("speech", "vision"):
        tokens = project(tower, [first, second], projector)
        np.testing.assert_allclose(tokens[0], expected[f"single_embeds_{projector}"], **TOLERANCE)
        for row, clip in enumerate((first, second)):
            own = tokens[row, : -(-len(clip) // 8)]
            np.testing.assert_allclose(own, expected[f"batch{row}_embeds_{projector}"], **TOLERANCE)


def test_oracle_windows(oracle_loaded, oracle):
    tower = oracle_loaded[1].audio
    with np.load(oracle / "data" / "audio_encoder.npz") as arrays:
        expected = dict(arrays)
    first, second = (expected[f"long{i}_features_f16"].astype(np.float32) for i in (1, 2))
    for name, clips in {"long": [first], "longbatch": [first, second]}.items():
        hidden = hidden_states(tower, clips)
        np.testing.assert_allclose(hidden[0], expected[f"{name}_subsampled"], **TOLERANCE)
        np.testing.assert_allclose(hidden[-1], expected[f"{name}_encoder_out"], **TOLERANCE)
