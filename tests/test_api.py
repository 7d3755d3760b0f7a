"""The Python face on the golden checkpoint."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import phi4mm_jax
from phi4mm_jax import Phi4MM
from phi4mm_jax.config import ConfigError, RuntimeConfig
from phi4mm_jax.processing.prompt import ChatError, MediaError, PromptError
from phi4mm_jax.runtime.limits import RequestError
from phi4mm_jax.runtime.sampling import SamplingError
from phi4mm_jax.weights.reader import CheckpointError

GOLDEN = Path(__file__).parent / "golden"
MEDIA = GOLDEN / "media"
ENGINE = {
    "max_batch": 4,
    "max_seq_len": 256,
    "batch_buckets": [1, 2, 4],
    "cache_buckets": [128, 512],
    "prefill_buckets": [16, 64],
    "prefill_block": 32,
    "crop_buckets": [1, 2, 4],
    "window_buckets": [1],
    "audio_buckets": [128],
    "decode_steps": 4,
}
IMAGE_PROMPT = "<|user|><|image_1|>What is shown?<|end|><|assistant|>"
CONVERSATION = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": str(MEDIA / "tall.png")}},
            {"type": "text", "text": "What is shown?"},
        ],
    }
]


@pytest.fixture(scope="module")
def model() -> Phi4MM:
    return Phi4MM.from_pretrained(GOLDEN / "hub", dtype="float32", progress=False, engine=ENGINE)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "model.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def cases() -> dict[str, dict]:
    """Arguments of each golden case."""
    return {
        name: {
            "ids": case["ids"],
            "images": [MEDIA / f"{image}.png" for image in case["images"]],
            "audios": [MEDIA / f"{clip}.wav" for clip in case["audios"]],
        }
        for name, case in json.loads((GOLDEN / "cases.json").read_text()).items()
    }


@pytest.fixture
def nothing_runs(model, monkeypatch):
    """Fails a test in which any program of the model is run."""

    def refuse(*_, **__):
        raise AssertionError("a program was run")

    for name in ("encode_images", "encode_audio", "place_media", "prefill", "logits", "begin", "decode"):
        monkeypatch.setattr(model.steps, name, refuse)


# --- loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hub", "native"])
def test_both_layouts(layout, golden, cases):
    model = Phi4MM.from_pretrained(GOLDEN / layout, dtype="float32", progress=False, engine=ENGINE)
    case = cases["image_audio"]
    found = model.logits(case["ids"], images=case["images"], audios=case["audios"])
    np.testing.assert_allclose(found, golden["logits/image_audio"], atol=2e-4, rtol=1e-4)


def test_float32_means_everything(model):
    dtypes = model.steps.runtime.dtypes
    assert (dtypes.params, dtypes.activations, dtypes.kv_cache) == ("float32",) * 3
    assert dtypes.matmul_precision == "highest"


def test_configurations(tmp_path):
    load = lambda **kwargs: Phi4MM.from_pretrained(GOLDEN / "hub", progress=False, **kwargs).steps.runtime  # noqa: E731
    assert load() == RuntimeConfig.load("cpu")
    assert load(config="gpu_t4", dtype="bfloat16").dtypes.params == "bfloat16"
    given = RuntimeConfig().override(engine={"max_batch": 3})
    assert load(config=given) == given
    assert load(config=given, mesh={"model": 2}).mesh.model == 2
    (tmp_path / "own.toml").write_text("[engine]\nmax_batch = 5\n")
    assert load(config=tmp_path / "own.toml").engine.max_batch == 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"config": "gpu_t5"}, ConfigError, "unknown preset 'gpu_t5'.*gpu_t4"),
        ({"engine": {"max_bach": 4}}, ConfigError, "engine.max_bach is an unknown setting; did you mean max_batch"),
        ({"dtype": "int8"}, ConfigError, "dtypes.params = 'int8': expected one of 'float32'"),
        ({"mesh": {"model": 64}}, ConfigError, "needs 64 devices"),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        Phi4MM.from_pretrained(GOLDEN / "hub", progress=False, **arguments)


def test_incomplete_checkpoint(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((GOLDEN / "hub" / name).read_bytes())
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Phi4MM.from_pretrained(tmp_path, dtype="float32", progress=False)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json"):
        Phi4MM.from_pretrained(tmp_path, dtype="float32", progress=False)


# --- generating ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text", "image_audio"])
def test_ids(model, golden, cases, name):
    case = cases[name]
    output = model.generate(case["ids"], images=case["images"], audios=case["audios"], max_tokens=16, ignore_eos=True)
    assert output.token_ids == golden[f"tokens/{name}"].tolist()
    assert output.text == model.processor.tokenizer.decode(output.token_ids)
    assert (output.finish_reason, output.logprobs) == ("length", None)


def test_a_batch_of_mixed_rows(model, golden, cases):
    """More rows than the engine has, in order, each as when alone."""
    names = list(cases)
    outputs = model.generate(
        [cases[name]["ids"] for name in names],
        images=[cases[name]["images"] or None for name in names],
        audios=[cases[name]["audios"] for name in names],
        max_tokens=16,
        ignore_eos=True,
    )
    assert len(outputs) > ENGINE["max_batch"]
    for name, output in zip(names, outputs, strict=True):
        assert output.token_ids == golden[f"tokens/{name}"].tolist(), name


def test_a_conversation_is_its_rendered_prompt(model):
    raw = model.generate(IMAGE_PROMPT, images=[MEDIA / "tall.png"], max_tokens=8)
    assert model.generate(CONVERSATION, max_tokens=8).token_ids == raw.token_ids
    with Image.open(MEDIA / "tall.png") as image:
        parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is shown?"}]
        direct = model.generate([{"role": "user", "content": parts}], max_tokens=8)
    assert direct.token_ids == raw.token_ids


def test_strings_conversations_and_ids_share_a_batch(model, cases):
    inputs = ["<|user|>Hi<|end|><|assistant|>", CONVERSATION, cases["text"]["ids"], np.array([5, 6, 7])]
    together = model.generate(inputs, max_tokens=6)
    assert [o.token_ids for o in together] == [model.generate(i, max_tokens=6).token_ids for i in inputs]


def test_settings_per_row(model):
    prompt = "<|user|>Tell me more<|end|><|assistant|>"
    outputs = model.generate(
        [prompt] * 4,
        temperature=[0, 1.5, 1.5, 1.5],
        seed=[None, 1, 1, 2],
        max_tokens=[3, 9, 9, 9],
        logprobs=[None, 2, None, 0],
        ignore_eos=True,
    )
    assert [len(o.token_ids) for o in outputs] == [3, 9, 9, 9]
    assert outputs[1].token_ids == outputs[2].token_ids != outputs[3].token_ids
    assert [o.logprobs is None for o in outputs] == [True, False, True, False]
    assert [len(entry.top) for entry in outputs[1].logprobs] == [2] * 9
    assert [entry.top for entry in outputs[3].logprobs] == [()] * 9
    assert [entry.token_id for entry in outputs[1].logprobs] == outputs[1].token_ids


def test_stop_strings(model):
    prompt = "<|user|>Hi<|end|><|assistant|>"
    whole = model.generate(prompt, max_tokens=24, temperature=1.0, seed=4, ignore_eos=True)
    stop = whole.text[6:8]
    cut = model.generate(prompt, max_tokens=24, temperature=1.0, seed=4, ignore_eos=True, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    rows = model.generate([prompt] * 2, max_tokens=24, temperature=1.0, seed=4, ignore_eos=True, stop=[[stop], []])
    assert [row.text for row in rows] == [cut.text, whole.text]
    shared = model.generate([prompt] * 2, max_tokens=24, temperature=1.0, seed=4, ignore_eos=True, stop=[stop, "\0"])
    assert [row.text for row in shared] == [cut.text] * 2


def test_usage(model, cases):
    case = cases["image_audio"]
    arguments = {"images": case["images"], "audios": case["audios"], "max_tokens": 6, "ignore_eos": True}
    usage = model.generate(case["ids"], **arguments).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (43, 6)
    assert (usage.image_tokens, usage.audio_tokens) == (22, 12)
    assert 0 < usage.time_to_first_token < usage.seconds
    assert usage.prefill_tokens_per_second > 0
    assert usage.decode_tokens_per_second > 0


# --- streaming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3, "logprobs": 1}], ids=str)
def test_streaming_is_generating(model, settings):
    settings = settings | {"max_tokens": 12, "ignore_eos": True}
    whole = model.generate(CONVERSATION, **settings)
    pieces = list(model.stream(CONVERSATION, **settings))
    assert len(pieces) > 6
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [token for piece in pieces for token in piece.token_ids] == whole.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [whole.finish_reason]
    assert pieces[-1].usage.completion_tokens == 12
    assert all(piece.usage is None for piece in pieces[:-1])
    if whole.logprobs is not None:
        entries = [entry for piece in pieces for entry in piece.logprobs]
        assert [e.token_id for e in entries] == [e.token_id for e in whole.logprobs]
        np.testing.assert_allclose([e.logprob for e in entries], [e.logprob for e in whole.logprobs], atol=2e-4)


def test_a_stream_can_be_left(model, golden, cases):
    stream = model.stream(CONVERSATION, max_tokens=50, ignore_eos=True)
    next(stream)
    stream.close()
    output = model.generate(cases["text"]["ids"], max_tokens=16, ignore_eos=True)
    assert output.token_ids == golden["tokens/text"].tolist()


def test_streams_and_calls_interleave(model):
    """Each goes on where it was, whatever is asked in between."""
    settings = {"max_tokens": 6, "ignore_eos": True}
    first, second = "<|user|>Hi<|end|><|assistant|>", [5, 6, 7]
    alone = [model.generate(inputs, **settings).token_ids for inputs in (first, second)]
    streams = [model.stream(inputs, **settings) for inputs in (first, second)]
    begun = [next(stream) for stream in streams]
    assert model.generate([second, first], **settings)[1].token_ids == alone[0]
    for piece, stream, expected in zip(begun, streams, alone, strict=True):
        pieces = [piece, *stream]
        assert [token for piece in pieces for token in piece.token_ids] == expected
        assert pieces[-1].finish_reason == "length"


# --- logits --------------------------------------------------------------------------------------------------


def test_logits_of_a_string(model):
    """A string is its expanded ids; media may be paths, images, or samples with their rate."""
    samples = np.sin(np.arange(9000) / 20).astype(np.float32)
    prompt = "<|user|><|image_1|><|audio_1|>What?<|end|><|assistant|>"
    found = model.logits(prompt, images=[MEDIA / "tall.png"], audios=[(samples, 16000)])
    with Image.open(MEDIA / "tall.png") as image:
        ids = model.processor.raw(prompt, images=[image], audios=[(samples, 16000)]).token_ids
        again = model.logits(ids.tolist(), images=[image], audios=[(samples, 16000)])
    assert (found.shape, found.dtype) == ((len(ids), 512), np.float32)
    np.testing.assert_array_equal(found, again)


def test_logits_say_what_is_generated_first(model):
    first = model.generate(CONVERSATION, max_tokens=1).token_ids
    assert model.logits(IMAGE_PROMPT, images=[MEDIA / "tall.png"])[-1].argmax() == first[0]


# --- bad input -----------------------------------------------------------------------------------------------

BAD = {
    "missing file": ((IMAGE_PROMPT,), {"images": ["no-such.png"]}, MediaError, r"images\[0\].*no-such\.png"),
    "not an image": ((IMAGE_PROMPT,), {"images": [MEDIA / "clip.wav"]}, MediaError, r"images\[0\]"),
    "not a list of images": ((IMAGE_PROMPT,), {"images": "photo.png"}, MediaError, "images: expected a list"),
    "an image too few": ((IMAGE_PROMPT,), {}, PromptError, "1 image placeholders for 0 images"),
    "an image too many": (("Hi",), {"images": [MEDIA / "tall.png"]}, PromptError, "0 image placeholders for 1 image"),
    "no audio": (("<|audio_1|>",), {"audios": [(np.zeros(10), 16000)]}, MediaError, r"audios\[0\]"),
    "empty": (("",), {}, PromptError, "empty"),
    "no input": ((None,), {}, ChatError, "expected a conversation"),
    "not a row": ((["Hi", None],), {}, ChatError, "expected a conversation"),
    "id outside": (([1, 512],), {}, PromptError, "token id 512.*0 to 511"),
    "unknown role": (([{"role": "robot", "content": "Hi"}],), {}, ChatError, "robot"),
    "tools of a string": (("Hi",), {"tools": "[]"}, ChatError, "tools"),
    "unknown setting": (("Hi",), {"temprature": 1}, SamplingError, "temprature: no such sampling setting"),
    "bad setting": (("Hi",), {"top_p": 2}, SamplingError, "top_p = 2"),
    "list for one input": (("Hi",), {"temperature": [1]}, SamplingError, r"temperature = \[1\]"),
    "values for other rows": ((["a", "b"],), {"top_k": [1]}, SamplingError, "top_k: has 1 values for 2 inputs"),
    "a bad row": ((["a", "b"],), {"top_k": [1, -1]}, SamplingError, "top_k = -1"),
    "media for other rows": ((["a", "b"],), {"images": [[]]}, ChatError, "images: has 1 lists for 2 inputs"),
    "media not in lists": (
        ([IMAGE_PROMPT] * 2,),
        {"images": [np.zeros((9, 9, 3), np.uint8)] * 2},
        ValueError,
        "images.*expected",
    ),
    "bias outside": ((CONVERSATION,), {"logit_bias": {512: 1}}, SamplingError, "logit_bias names token 512"),
    "too long": (([5] * 257,), {}, RequestError, "257 tokens.*256"),
    "answer too long": (([5] * 250,), {"max_tokens": 7}, RequestError, "max_tokens = 7.*at most 6"),
    "a row too long": ((["Hi", [5] * 300],), {}, RequestError, "300 tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_runs(model, nothing_runs, name):
    arguments, keywords, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        model.generate(*arguments, **keywords)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing file", "bad setting", "unknown setting", "bias outside", "too long"])
def test_a_stream_refuses_at_the_call(model, nothing_runs, name):
    arguments, keywords, error, message = BAD[name]
    with pytest.raises(error, match=message):
        model.stream(*arguments, **keywords)


def test_logits_refuse_too(model, nothing_runs):
    with pytest.raises(MediaError, match=r"images\[0\]"):
        model.logits(IMAGE_PROMPT, images=["no-such.png"])
    with pytest.raises(RequestError, match="257 tokens"):
        model.logits([5] * 257)


def test_after_an_error_the_model_answers(model, golden, cases):
    with pytest.raises(RequestError):
        model.generate(["Hi", [5] * 300])
    output = model.generate(cases["text"]["ids"], max_tokens=16, ignore_eos=True)
    assert output.token_ids == golden["tokens/text"].tolist()


def test_public_names():
    assert set(phi4mm_jax.__all__) >= {"Phi4MM", "Output", "Piece", "SamplingParams"}
    for name in phi4mm_jax.__all__:
        assert getattr(phi4mm_jax, name) is not None
    assert dataclasses.is_dataclass(phi4mm_jax.Output)


# --- on an accelerator ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", [pytest.param(p, marks=getattr(pytest.mark, p)) for p in ("gpu", "tpu")])
def test_golden_cases_on_an_accelerator(model, golden, cases, platform):
    """Logits of every position alone, and the tokens of one mixed batch."""
    assert jax.default_backend() == platform
    for name, case in cases.items():
        logits = model.logits(case["ids"], images=case["images"], audios=case["audios"])
        np.testing.assert_allclose(logits, golden[f"logits/{name}"], atol=2e-4, rtol=1e-4, err_msg=name)
    drawn = [name for name in cases if f"tokens/{name}" in golden]
    columns = {key: [cases[name][key] for name in drawn] for key in ("ids", "images", "audios")}
    outputs = model.generate(
        columns["ids"], images=columns["images"], audios=columns["audios"], max_tokens=16, ignore_eos=True
    )
    for name, output in zip(drawn, outputs, strict=True):
        assert output.token_ids == golden[f"tokens/{name}"].tolist(), name
