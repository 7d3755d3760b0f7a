"""The speech tower against the original, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


def pad(clips):
    """Log-mel clips as one array [B, T, mel]; the frames that exist; and each clip's own sub-frames."""
    length = max(map(len, clips))
    features = np.stack([np.pad(clip, ((0, length - len(clip)), (0, 0))) for clip in clips])
    own = np.array([-(-len(clip) // 8) for clip in clips], np.int32)
    return features, np.full(len(clips), length, np.int32), own


def encode(tower, features, frames, num_keys):
    return np.asarray(jax.jit(lambda *args: tower.encode(*args))(features, frames, num_keys))


def hidden_states(tower, features, frames, num_keys):
    """What subsampling gives and every layer's output, for clips of one window."""

    @jax.jit
    def run(features, frames, num_keys):
        x = (features - tower.mean.get_value()[None, None]) * tower.inv_std.get_value()[None, None]
        hidden = [tower.subsampling(x, frames)]
        keys = jnp.arange(hidden[0].shape[1])[None, :] < num_keys[:, None]
        for layer in tower.layers:
            hidden.append(layer(hidden[-1], tower.position_bias(keys.shape[1]), keys))
        return hidden

    return run(features, frames, num_keys)


@pytest.fixture(scope="session")
def clips(processor, media):
    """Log-mel features of the golden clips."""
    paths = {name: media / f"{name}.wav" for name in ("clip", "short")}
    return {name: processor.raw("<|audio_1|>", audios=[path]).audios[0].features for name, path in paths.items()}


def test_every_layer_matches_the_original(model, golden, clips):
    hidden = hidden_states(model.audio, *pad([clips["clip"]]))
    for i, x in enumerate(hidden):
        np.testing.assert_allclose(x, golden[f"audio/clip_hidden_{i}"], **TOLERANCE)


def test_a_clip_alone_and_a_masked_batch_match_the_original(model, golden, clips):
    np.testing.assert_allclose(encode(model.audio, *pad([clips["clip"]])), golden["audio/clip_encoded"], **TOLERANCE)
    both = encode(model.audio, *pad([clips["clip"], clips["short"]]))
    np.testing.assert_allclose(both, golden["audio/both_encoded"], **TOLERANCE)


def test_more_than_one_window_matches_the_original(model, golden):
    """502 sub-frames are two windows; a lone clip sees the padding of its last window, clips of a batch do not."""
    long = golden["audio/long_features"].astype(np.float32)
    features, frames, _ = pad([long])
    alone = encode(model.audio, features, frames, np.array([2 * model.audio.config.window], np.int32))
    np.testing.assert_allclose(alone, golden["audio/long_encoded"], **TOLERANCE)
    both = encode(model.audio, *pad([long, long[1000:1900]]))
    np.testing.assert_allclose(both, golden["audio/long_both_encoded"], **TOLERANCE)


@pytest.mark.parametrize("projector", ["speech", "vision"])
@pytest.mark.parametrize("batch", [["clip"], ["clip", "short"]], ids=["clip", "both"])
def test_projected_tokens_match_the_original(model, golden, clips, batch, projector):
    features, frames, num_keys = pad([clips[name] for name in batch])
    with_image = np.full(len(batch), projector == "vision")
    tokens = jax.jit(lambda *args: model.audio(*args))(features, frames, num_keys, with_image)
    expected = golden[f"audio/{'clip' if len(batch) == 1 else 'both'}_{projector}_tokens"]
    for row, count in enumerate(num_keys):
        np.testing.assert_allclose(tokens[row, :count], expected[row, :count], **TOLERANCE)


def test_each_row_takes_its_own_projector(model, golden, clips):
    features, frames, num_keys = pad([clips["clip"]] * 2)
    tokens = jax.jit(lambda *args: model.audio(*args))(features, frames, num_keys, np.array([True, False]))
    np.testing.assert_allclose(tokens[0], golden["audio/clip_vision_tokens"][0], **TOLERANCE)
    np.testing.assert_allclose(tokens[1], golden["audio/clip_speech_tokens"][0], **TOLERANCE)


@pytest.mark.parametrize("length", [96, 128])
def test_padding_changes_nothing(model, golden, clips, length):
    """A bucket longer than the clip gives the clip's own result, to the last sub-frame."""
    features, frames, num_keys = pad([clips["clip"]])
    features = np.pad(features, ((0, 0), (0, length - features.shape[1]), (0, 0)), constant_values=3.0)
    tokens = encode(model.audio, features, frames, num_keys)[:, : num_keys[0]]
    np.testing.assert_allclose(tokens, golden["audio/clip_encoded"], **TOLERANCE)


def test_oracle(oracle_loaded, oracle):
    _, model = oracle_loaded
    tower = model.audio
    with np.load(oracle / "data" / "audio_encoder.npz") as arrays:
        expected = dict(arrays)
    with np.load(oracle / "data" / "audio_features.npz") as arrays:
        first, second = arrays["w16a_logmel"], arrays["w16b_logmel"]
    np.testing.assert_allclose(tower.position_bias(40), expected["relative_bias_40"], **TOLERANCE)
    hidden = hidden_states(tower, *pad([first]))
    for x, name in zip(hidden, ("subsampled", "layer0", "layer1", "layer2"), strict=True):
        np.testing.assert_allclose(x, expected[f"single_{name}"], **TOLERANCE)
    np.testing.assert_allclose(hidden[-1], expected["single_encoder_out"], **TOLERANCE)
    features, frames, num_keys = pad([first, second])
    hidden = hidden_states(tower, features, frames, num_keys)
    np.testing.assert_allclose(hidden[0], expected["batch_subsampled"], **TOLERANCE)
    np.testing.assert_allclose(hidden[-1], expected["batch_encoder_out"], **TOLERANCE)
    for projector, with_image in (("speech", False), ("vision", True)):
        tokens = jax.jit(lambda *args: tower(*args))(features, frames, num_keys, np.full(2, with_image))
        for row in range(2):
            own = tokens[row, : num_keys[row]]
            np.testing.assert_allclose(own, expected[f"batch{row}_embeds_{projector}"], **TOLERANCE)
        np.testing.assert_allclose(tokens[0], expected[f"single_embeds_{projector}"], **TOLERANCE)


def test_oracle_windows(oracle_loaded, oracle):
    _, model = oracle_loaded
    with np.load(oracle / "data" / "audio_encoder.npz") as arrays:
        expected = dict(arrays)
    first, second = (expected[f"long{i}_features_f16"].astype(np.float32) for i in (1, 2))
    subsample = jax.jit(lambda x, n: model.audio.subsampling(x, n))
    mean, inv_std = (w.get_value()[None, None] for w in (model.audio.mean, model.audio.inv_std))
    for name, clips in {"long": [first], "longbatch": [first, second]}.items():
        features, frames, num_keys = pad(clips)
        if len(clips) == 1:
            num_keys = np.array([1000], np.int32)
        subsampled = subsample((features - mean) * inv_std, frames)
        np.testing.assert_allclose(subsampled, expected[f"{name}_subsampled"], **TOLERANCE)
        encoded = encode(model.audio, features, frames, num_keys)
        np.testing.assert_allclose(encoded, expected[f"{name}_encoder_out"], **TOLERANCE)
