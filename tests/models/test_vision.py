"""The image tower against the original, layer by layer."""

import jax
import numpy as np
import pytest

from phi4mm_jax.models.vision import _patchify
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.prompt import ROW_SEPARATOR

TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


def hidden_states(tower, crops, mask, position_ids):
    """The embedding and the output of every layer, each [C, P, D]."""

    @jax.jit
    def run(crops, mask, position_ids):
        x = tower.patch_embedding(_patchify(crops, tower.config.patch_size))
        hidden = [x + tower.position_embedding.get_value()[position_ids]]
        for layer in tower.layers:
            hidden.append(layer(hidden[-1], mask))
        return hidden

    return run(crops, mask.reshape(len(mask), -1), position_ids)


def tokens_of(tower, image):
    """Projected tokens of one picture, in prompt order [N, D]."""
    mask = image.mask.reshape(len(image.mask), -1)
    rows = np.asarray(jax.jit(lambda *args: tower(*args))(image.crops, mask, image.position_ids))
    separators = np.where(image.layout == ROW_SEPARATOR, len(rows) - 2, len(rows) - 1)
    return rows[np.where(image.layout < 0, separators, image.layout)]


def picture(processor, path):
    return processor.raw("<|image_1|>", images=[path]).images[0]


def test_every_layer_matches_the_original(model, golden, processor, media):
    image = picture(processor, media / "bottom.png")
    assert not image.mask.all(axis=(1, 2)).all()  # some patches are padding
    for i, hidden in enumerate(hidden_states(model.vision, image.crops, image.mask, image.position_ids)):
        np.testing.assert_allclose(hidden, golden[f"vision/bottom_hidden_{i}"], **TOLERANCE)


@pytest.mark.parametrize("name", ["tiles", "bottom", "right", "tall", "exact"])
def test_tokens_match_the_original(model, golden, processor, media, name):
    tokens = tokens_of(model.vision, picture(processor, media / f"{name}.png"))
    np.testing.assert_allclose(tokens, golden[f"vision/{name}_tokens"], **TOLERANCE)


def test_crops_do_not_see_each_other(model, processor, media):
    """A crop's features are the same alone and among others, whatever those show."""
    image = picture(processor, media / "bottom.png")
    mask = image.mask.reshape(len(image.mask), -1)
    features = jax.jit(lambda *args: model.vision.features(*args))
    together = features(image.crops, mask, image.position_ids)
    other = image.crops.copy()
    other[:-1] = 0.5
    np.testing.assert_allclose(features(other, mask, image.position_ids)[-1], together[-1], atol=1e-6)


def test_padded_patches_are_not_seen(model, processor, media):
    """Real patches do not depend on what the padding shows."""
    image = picture(processor, media / "bottom.png")
    mask = image.mask.reshape(len(image.mask), -1)
    features = jax.jit(lambda *args: model.vision.features(*args))
    plain = np.asarray(features(image.crops, mask, image.position_ids))
    side = model.vision.config.patch_size
    shown = np.kron(image.mask, np.ones((side, side), bool))[:, None]
    changed = np.asarray(features(np.where(shown, image.crops, 0.25), mask, image.position_ids))
    np.testing.assert_allclose(changed[mask], plain[mask], atol=1e-6)
    assert np.abs(changed - plain)[~mask].max() > 1e-2


def test_oracle_layers_and_tokens(oracle_loaded, oracle):
    config, model = oracle_loaded
    with np.load(oracle / "data" / "vision.npz") as arrays:
        expected = dict(arrays)
    crops, mask = (np.concatenate(expected[n]) for n in ("pixel_values", "image_attention_mask"))
    mask = mask.astype(bool)
    for i, hidden in enumerate(hidden_states(model.vision, crops, mask, expected["position_ids"])):
        np.testing.assert_allclose(hidden, expected[f"hidden_{i}"], **TOLERANCE)
    np.testing.assert_allclose(hidden, expected["feature_minus2"], **TOLERANCE)
    side = config.vision.tokens_per_side
    pooled = np.asarray(hidden).reshape(-1, side, 2, side, 2, hidden.shape[-1]).mean(axis=(2, 4))
    np.testing.assert_allclose(pooled.reshape(expected["pooled_2x2"].shape), expected["pooled_2x2"], **TOLERANCE)


@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_oracle_tokens(oracle_loaded, oracle, name):
    config, model = oracle_loaded
    image = picture(Processor.from_checkpoint(oracle / "ckpt_hub", config), oracle / "images" / f"{name}.png")
    with np.load(oracle / "data" / "vision.npz") as arrays:
        np.testing.assert_allclose(tokens_of(model.vision, image), arrays[f"{name}_image_embeds"], **TOLERANCE)
