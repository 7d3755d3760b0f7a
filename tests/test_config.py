import dataclasses
import logging
from pathlib import Path

import pytest

from phi4mm_jax.config import (
    ConfigError,
    DTypeConfig,
    EngineConfig,
    ModelConfig,
    RuntimeConfig,
    parse_settings,
    presets,
)

MODEL_TOML = Path(__file__).parents[1] / "configs" / "model" / "phi4mm.toml"


@pytest.fixture(scope="module")
def released() -> ModelConfig:
    return ModelConfig.from_toml(MODEL_TOML)


@pytest.mark.parametrize("preset", presets())
def test_every_preset_loads(preset: str) -> None:
    assert isinstance(RuntimeConfig.load(preset), RuntimeConfig)


def test_preset_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[engine]\nmax_batch = 3\n")
    assert RuntimeConfig.load(path).engine.max_batch == 3
    assert RuntimeConfig.load(str(path)) == RuntimeConfig.load(path)


def test_overrides_keep_the_rest_of_the_preset() -> None:
    base = RuntimeConfig.load("cpu")
    changed = RuntimeConfig.load("cpu", engine={"max_batch": 2})
    assert changed.engine == dataclasses.replace(base.engine, max_batch=2)
    assert changed.dtypes == base.dtypes
    assert base.override(engine={"max_batch": 2}) == changed


def test_settings_are_toml_values() -> None:
    values = ["engine.max_batch=8", "engine.batch_buckets=[1, 2]", "dtypes.params=float32", 'dtypes.kv_cache="float16"']
    sections = parse_settings(values)
    assert sections == {
        "engine": {"max_batch": 8, "batch_buckets": [1, 2]},
        "dtypes": {"params": "float32", "kv_cache": "float16"},
    }
    config = RuntimeConfig.load("cpu", **sections)
    assert (config.engine.batch_buckets, config.dtypes.params) == ((1, 2), "float32")


@pytest.mark.parametrize("setting", ["engine", "engine.max_batch", "max_batch=8", ".a=1", "engine.=1", "=", ""])
def test_malformed_setting(setting: str) -> None:
    with pytest.raises(ConfigError, match="expected section.name=value"):
        parse_settings([setting])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"engine": {"max_bacth": 8}}, r"unknown setting engine.max_bacth; did you mean engine.max_batch\?"),
        ({"engin": {"max_batch": 8}}, r"unknown setting engin; did you mean engine\?"),
        ({"engine": {"zzz": 8}}, "unknown setting engine.zzz; valid keys: max_batch"),
        ({"engine": {"max_batch": 0}}, "EngineConfig.max_batch = 0: must be positive"),
        ({"engine": {"max_batch": "8"}}, "engine.max_batch = '8': expected int"),
        ({"engine": {"max_batch": True}}, "engine.max_batch = True: expected int"),
        ({"engine": {"prefill_buckets": [256, 64]}}, "engine.prefill_buckets .* increasing"),
        ({"engine": {"prefill_buckets": 64}}, "engine.prefill_buckets = 64: expected a list"),
        ({"engine": {"crop_buckets": [2, 4]}}, r"engine.crop_buckets = \[2, 4\]: must begin with 1"),
        ({"engine": 8}, "engine: expected a table of settings, got 8"),
        ({"dtypes": {"params": "int3"}}, "dtypes.params = 'int3': expected one of 'float32'"),
    ],
)
def test_bad_settings_are_named(sections: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig.load("cpu", **sections)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[engine", "not valid TOML"), ("[engine]\nmax_bach = 1", "did you mean"), (None, "cannot be read")],
)
def test_bad_files_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig.load(path)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'gpu'; available: auto, cpu, gpu_hopper"):
        RuntimeConfig.load("gpu")


@pytest.mark.parametrize(
    ("platform", "kind", "count", "preset"),
    [
        ("cpu", "cpu", 8, "cpu"),
        ("gpu", "NVIDIA H200", 1, "gpu_hopper"),
        ("gpu", "Tesla T4", 1, "gpu_t4"),
        ("tpu", "TPU v5 lite", 1, "tpu_v5e_1"),
        ("tpu", "TPU v5 lite", 8, "tpu_v5e_8"),
        ("tpu", "TPU v5", 4, "tpu_v5p"),
        ("tpu", "TPU v6 lite", 1, "tpu_v6e"),
    ],
)
def test_auto_picks_by_device_and_says_so(
    platform: str, kind: str, count: int, preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert RuntimeConfig.auto(platform, kind, count) == RuntimeConfig.load(preset)
    assert f"preset {preset} for {count} x {kind}" in caplog.text


def test_configs_are_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().max_batch = 1
    with pytest.raises(TypeError):
        DTypeConfig("float32")


def test_derived_values_of_the_released_model(released: ModelConfig) -> None:
    text, vision, audio = released.text, released.vision, released.audio
    assert (text.head_dim, text.rotary_dim, round(text.rope_scale, 9)) == (128, 96, 1.190238071)
    assert (vision.patches_per_side, vision.tokens_per_crop, vision.num_used_layers) == (32, 256, 26)
    assert (audio.window_frames, audio.num_tokens(1), audio.num_tokens(9)) == (4000, 1, 2)
    assert (released.vision_lora.scale, released.speech_lora.scale) == (2.0, 2.0)


def test_bad_model_values(released: ModelConfig) -> None:
    for changes, message in [
        ({"num_heads": 7}, "multiple of num_heads 7"),
        ({"short_factor": (1.0,)}, "short_factor has 1 values; expected 48"),
        ({"hidden_size": 0}, "hidden_size = 0: must be positive"),
    ]:
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(released.text, **changes)


def test_released_config_equals_the_preset(shared: Path, released: ModelConfig) -> None:
    assert ModelConfig.from_checkpoint(shared / "tokenizer") == released


def test_both_layouts_describe_the_same_model(oracle: Path) -> None:
    hub, native = (ModelConfig.from_checkpoint(oracle / name) for name in ("ckpt_hub", "ckpt_native"))
    assert hub.vision.max_crops == 12
    assert (hub.tokens.image, hub.tokens.audio, hub.tokens.pad, set(hub.tokens.eos)) == (500, 501, 505, {505, 506})
    vision = dataclasses.replace(native.vision, max_crops=12)  # the native layout does not say it
    tokens = dataclasses.replace(native.tokens, eos=tuple(reversed(native.tokens.eos)))  # a set, written in any order
    assert dataclasses.replace(native, vision=vision, tokens=tokens) == hub


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; expected a checkpoint directory"),
        ("{", "not valid JSON"),
        ("{}", "model_type is None; expected phi4mm or phi4_multimodal"),
        ('{"model_type": "llama"}', "model_type is 'llama'"),
        ('{"model_type": "phi4mm"}', "missing key"),
    ],
)
def test_bad_checkpoint_directory(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_checkpoint(tmp_path)
