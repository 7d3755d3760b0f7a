"""Quantization by what the model computes: less error than without, and only what counts is looked at."""

import json
from pathlib import Path
from random import Random

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantized import Format, QuantizedArray, quantize
from phi4mm_jax import Phi4MM, cli
from phi4mm_jax.config import ConfigError
from phi4mm_jax.processing.prompt import ChatError
from phi4mm_jax.runtime import calibration
from phi4mm_jax.runtime.gptq import gptq
from phi4mm_jax.weights.saved import Manifest

WORDS = "the red apple sees my dog old green bird takes your small house and cold milk near".split()
ONE = np.arange(20) + 300


def conversation(rng: Random) -> list[dict]:
    text = " ".join(rng.sample(WORDS, 6))
    return [{"role": "user", "content": f"Repeat after me: {text}"}, {"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def conversations() -> list[list[dict]]:
    rng = Random(0)
    return [conversation(rng) for _ in range(12)]


def load(**sections: dict) -> Phi4MM:
    return Phi4MM.from_pretrained("nano", dtype="float32", progress=False, **sections)


# --- one weight ----------------------------------------------------------------------------------------------


def inputs(columns: int, rows: int = 400) -> np.ndarray:
    """Inputs of few directions, as those of a model are."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(rows, 12)) @ rng.normal(size=(12, columns))).astype(np.float32)


@pytest.mark.parametrize(
    "form",
    [Format(4, 32), Format(4, 64), Format(4), Format(8), Format(4, 32, zero_point=True), Format(8, floating=True)],
    ids=str,
)
def test_products_keep_more_of_their_value(form: Format) -> None:
    x, w = inputs(192), np.random.default_rng(1).normal(size=(40, 192)).astype(np.float32)

    def error(q: QuantizedArray) -> float:
        return float(np.square(x @ (np.asarray(q.dequantize()) - w).T).mean())

    assert error(gptq(w, x.T @ x, form)) < 0.25 * error(quantize(jnp.asarray(w), form))


@pytest.mark.parametrize("form", [Format(4, 32), Format(8, floating=True)], ids=str)
def test_without_correlation_it_is_plain_rounding(form: Format) -> None:
    w = np.random.default_rng(1).normal(size=(24, 96)).astype(np.float32)
    plain = quantize(jnp.asarray(w), form)
    rounded = gptq(w, 7 * np.eye(96, dtype=np.float32), form)
    np.testing.assert_array_equal(rounded.values, plain.values)
    np.testing.assert_array_equal(rounded.scales, plain.scales)


def test_without_correlation_offsets_are_those_of_plain_rounding() -> None:
    w, form = np.random.default_rng(1).exponential(size=(24, 96)).astype(np.float32), Format(4, 32, zero_point=True)
    plain, rounded = quantize(jnp.asarray(w), form), gptq(w, 7 * np.eye(96, dtype=np.float32), form)
    np.testing.assert_allclose(rounded.offsets, plain.offsets, rtol=1e-5)
    np.testing.assert_allclose(rounded.dequantize(), plain.dequantize(), atol=1e-5)


@pytest.mark.parametrize("moments", [np.zeros((64, 64), np.float32), np.ones((64, 64), np.float32)])
def test_moments_without_full_rank(moments: np.ndarray) -> None:
    w = np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)
    q = gptq(w, moments, Format(4, 32))
    assert np.isfinite(np.asarray(q.dequantize())).all()
    assert (q.values.dtype, q.scales.dtype) == (jnp.int4, jnp.float32)


# --- a model -------------------------------------------------------------------------------------------------


def divergence(expected: np.ndarray, logits: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of next-token distributions."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(expected), log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_the_model_changes_less(conversations: list[list[dict]]) -> None:
    model = load()
    rng = Random(1)
    tests = [model.processor.conversation(conversation(rng)).token_ids for _ in range(4)]
    expected = [model.logits(ids) for ids in tests]
    model.quantize(conversations, "int4", group_size=64)
    plain = load(quantization={"decoder": "int4", "adapters": "int8", "embedding": "int8"})
    assert plain.steps.runtime == model.steps.runtime
    assert {p: type(leaf) for p, leaf in plain.steps.unpack(plain.weights).items()} == (
        {p: type(leaf) for p, leaf in model.steps.unpack(model.weights).items()}
    )
    ours, theirs = (
        np.mean([divergence(e, m.logits(ids)) for e, ids in zip(expected, tests, strict=True)]) for m in (model, plain)
    )
    assert ours < 0.6 * theirs
    text = "cold milk and the green bird"
    output = model.generate([{"role": "user", "content": f"Repeat after me: {text}"}])
    assert output.text == text


def test_padding_and_chunks_do_not_count(conversations: list[list[dict]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of prompts in one padded chunk, and cut into exact ones: the same sums."""
    seen = []

    def record(w: np.ndarray, moments: np.ndarray, form: Format) -> QuantizedArray:
        seen[-1].append(moments)
        return quantize(jnp.asarray(w), form)

    monkeypatch.setattr(calibration, "gptq", record)
    for buckets in ((64,), (1, 16)):
        seen.append([])
        load(engine={"prefill_buckets": buckets}).quantize(conversations[:2], "int8")
    assert len(seen[0]) == 4 * 4
    for padded, exact in zip(*seen, strict=True):
        np.testing.assert_allclose(padded, exact, rtol=1e-3, atol=1e-3 * np.abs(padded).max())


def test_parts_see_what_was_quantized_before(conversations: list[list[dict]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_MOMENT_BYTES", 1_500_000)  # a layer at a time
    seen = []
    run = calibration._moments

    def record(steps: object, weights: tuple, *rest: object) -> dict:
        seen.append(sum(isinstance(leaf, QuantizedArray) for leaf in weights.text))
        return run(steps, weights, *rest)

    monkeypatch.setattr(calibration, "_moments", record)
    load().quantize(conversations[:1], "int8", adapters="none", embedding="none")
    assert seen == [0, 4, 8, 12]


def test_speech_and_pictures_are_looked_at() -> None:
    picture, clip = np.zeros((40, 40, 3), np.uint8), (np.zeros(8000, np.float32), 16_000)
    turns = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "audio", "audio": clip}]},
        {"role": "assistant", "content": "red"},
    ]
    model = load()
    model.quantize([turns], 8)
    assert isinstance(model.steps.unpack(model.weights)["text.layers.3.mlp.down.weight"], QuantizedArray)


# --- files and errors ----------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, conversations: list[list[dict]]) -> None:
    file, out = tmp_path / "calibration.jsonl", tmp_path / "saved"
    file.write_text("\n\n".join(json.dumps({"messages": messages}) for messages in conversations[:2]))
    arguments = ["quantize", "nano", str(out), "--quantize", "int4", "--calibration", str(file), "--quiet"]
    assert cli.main([*arguments, "--set", "quantization.group_size=32"]) == 0
    assert Manifest.read(out).quantization.group_size == 32
    assert Phi4MM.from_pretrained(out, progress=False).logits(ONE).shape == (20, 1024)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ('{"messages": []}\n{"text": "x"}', "line 2: expected an object such as"),
        ("[1]", "line 1: expected an object such as"),
        ("{", "line 1: expected an object such as"),
    ],
)
def test_a_bad_file_is_refused_before_anything_is_loaded(
    tmp_path: Path, content: str | None, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "calibration.jsonl"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(cli, "_load", None)
    assert cli.main(["quantize", "nano", str(tmp_path / "out"), "--calibration", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_quantized(conversations: list[list[dict]]) -> None:
    model = load()
    with pytest.raises(ChatError, match=r"calibration\[1\]: "):
        model.quantize([conversations[0], [{"role": "nobody", "content": ""}]])
    with pytest.raises(ConfigError, match="calibration: has no conversations"):
        model.quantize([])
    with pytest.raises(ConfigError, match="group_size = 128 does not divide"):
        model.quantize(conversations, group_size=128)
    assert model.logits(ONE).shape == (20, 1024)  # it is as it was
    model.quantize(conversations[:1], "int8")
    with pytest.raises(ConfigError, match="quantized already"):
        model.quantize(conversations)
