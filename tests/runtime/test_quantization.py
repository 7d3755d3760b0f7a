"""Quantization while loading: what is quantized, what the plan counts, and that the model still knows its answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized import QuantizedArray
from phi4mm_jax import Phi4MM
from phi4mm_jax.config import ConfigError, QuantizationConfig, RuntimeConfig, quantization_settings
from phi4mm_jax.runtime.memory import plan_memory

ASKED = {
    "Repeat after me: the red apple sees my dog": "the red apple sees my dog",
    "Reverse the words: red dog moon": "moon dog red",
    "What is 27 plus 58?": "85",
}


def load(quantize: str | None, **sections: dict) -> Phi4MM:
    return Phi4MM.from_pretrained("nano", dtype="float32", quantize=quantize, progress=False, **sections)


def leaves(model: Phi4MM) -> dict[str, jax.Array | QuantizedArray]:
    return model.steps.unpack(model.weights)


@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("int8", {}),
        ("w8a8", {}),
        ("fp8", {}),
        ("int4", {"group_size": 32}),
        ("int4", {"group_size": 64, "zero_point": True}),
    ],
    ids=str,
)
def test_the_model_still_answers(form: str, settings: dict) -> None:
    model = load(form, quantization=settings)
    outputs = model.generate([[{"role": "user", "content": text}] for text in ASKED])
    assert [output.text for output in outputs] == list(ASKED.values())


def test_what_is_quantized() -> None:
    placed = leaves(load("int4"))
    quantized = {path: leaf for path, leaf in placed.items() if isinstance(leaf, QuantizedArray)}
    assert {path for path in placed if path.startswith("text.") and path not in quantized} == {
        path for path in placed if path.startswith("text.") and "norm" in path
    }
    assert not any(path.startswith(("vision.", "audio.")) for path in quantized)
    assert quantized["text.layers.0.mlp.down.weight"].values.dtype == jnp.int4
    assert quantized["text.layers.0.mlp.down.vision_a"].values.dtype == jnp.int8
    assert quantized["text.embed.weight"].values.dtype == jnp.int8


@pytest.mark.parametrize(
    ("form", "settings"), [("int4", {}), ("int4", {"zero_point": True}), ("fp8", {"encoders": "fp8"})], ids=str
)
def test_the_plan_counts_what_is_placed(form: str, settings: dict) -> None:
    model = load(form, quantization=settings)
    placed = jax.tree.leaves(model.weights)
    size = sum(leaf.size * (4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize) // 8 for leaf in placed)
    assert plan_memory(model.steps, 1, 1024).weights == size


def test_encoders_and_exceptions() -> None:
    placed = leaves(load(None, quantization={"encoders": "int8", "decoder": "int8", "keep": ["text.layers.1.*"]}))
    assert isinstance(placed["vision.layers.0.mlp.up.weight"], QuantizedArray)
    assert isinstance(placed["audio.layers.0.attention.q.weight"], QuantizedArray)
    assert isinstance(placed["text.layers.0.mlp.down.weight"], QuantizedArray)
    for path in ("text.layers.1.mlp.down.weight", "audio.layers.0.conv.depthwise.weight", "vision.position_embedding"):
        assert not isinstance(placed[path], QuantizedArray)


@pytest.mark.parametrize("settings", [{"group_size": 32}, {"group_size": 64, "zero_point": True}], ids=str)
def test_devices_share_a_quantized_model(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the groups of a row, of which some have three, do not come out even."""
    monkeypatch.setenv("PHI4MM_NATIVE", "0")  # one device would round activations
    ids = np.arange(20) + 300
    alone = load("int4", quantization=settings).logits(ids)
    together = load("int4", quantization=settings, mesh={"model": 2}).logits(ids)
    np.testing.assert_allclose(together, alone, atol=2e-4)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="group_size = 128 does not divide the 192 columns of text.layers.0"):
        Phi4MM.from_pretrained("nano", quantize="int4", quantization={"group_size": 128}, progress=False)
    with pytest.raises(ConfigError, match="quantize = 'int3': expected int8, w8a8, fp8, int4"):
        quantization_settings("int3")
    with pytest.raises(ConfigError, match="quantization.decoder = 'int2': expected one of"):
        RuntimeConfig.load("cpu", quantization={"decoder": "int2"})
    with pytest.raises(ConfigError, match="quantization.zero_point = True: only int4 has one"):
        load("fp8", quantization={"zero_point": True})
    with pytest.raises(ConfigError, match="quantization.zero_point = 1: expected bool"):
        load("int4", quantization={"zero_point": 1})


@pytest.mark.parametrize(("name", "form"), [("Q4K", "int4"), ("Q8_0", "int8"), (4, "int4"), ("8", "int8")])
def test_names_of_mistralrs(name: str | int, form: str) -> None:
    assert quantization_settings(name)[1] == form


def test_formats_of_leaves() -> None:
    config = QuantizationConfig(decoder="int4", adapters="int8", embedding="w8a8", encoders="int8")
    assert config.format_of("text.layers.3.attention.qkv.weight", 2) == "int4"
    assert config.format_of("text.layers.3.attention.qkv.speech_b", 2) == "int8"
    assert config.format_of("text.layers.3.input_norm.weight", 1) == "none"
    assert config.format_of("text.embed.weight", 2) == "w8a8"
    assert config.format_of("audio.relative_bias", 2) == "none"
