import copy
import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phi4mm_jax.config import (
    ConfigError,
    DTypeConfig,
    EngineConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    RuntimeConfig,
    models,
    parse_settings,
    presets,
)

MODEL_TOML = Path(__file__).parents[1] / "configs" / "model" / "phi4mm.toml"
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def released() -> ModelConfig:
    return ModelConfig.load("phi4mm")


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
        ({"engine": {"max_bacth": 8}}, r"^engine.max_bacth is an unknown setting; did you mean max_batch\?"),
        ({"engin": {"max_batch": 8}}, r"^engin is an unknown setting; did you mean engine\?"),
        ({"engine": {"zzz": 8}}, "engine.zzz is an unknown setting; valid settings: max_batch"),
        ({"engine": {"max_batch": 0}}, "engine.max_batch = 0: must be positive"),
        ({"engine": {"max_batch": "8"}}, "engine.max_batch = '8': expected int"),
        ({"engine": {"max_batch": True}}, "engine.max_batch = True: expected int"),
        ({"engine": {"max_batch": 8.0}}, "engine.max_batch = 8.0: expected int"),
        ({"engine": {"prefill_buckets": [64, "x"]}}, r"engine.prefill_buckets\[1\] = 'x': expected int"),
        ({"engine": {"prefill_call_cost": -1}}, "engine.prefill_call_cost = -1: must not be negative"),
        ({"engine": {"audio_buckets": [12]}}, "engine.audio_buckets = .*multiples of 8"),
        ({"engine": {"prefill_buckets": [256, 64]}}, "engine.prefill_buckets .* increasing"),
        ({"engine": {"prefill_buckets": 64}}, "engine.prefill_buckets = 64: expected a list"),
        ({"engine": {"crop_buckets": [2, 4]}}, r"engine.crop_buckets = \[2, 4\]: must begin with 1"),
        ({"engine": 8}, "engine = 8: expected a table of settings"),
        ({"dtypes": {"params": "int3"}}, "dtypes.params = 'int3': expected one of 'float32'"),
    ],
)
def test_bad_settings_are_named(sections: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig.load("cpu", **sections)


def test_sections_may_be_dataclasses() -> None:
    assert RuntimeConfig.load("cpu", mesh=MeshConfig(model=2)).mesh.model == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EngineConfig(max_batch="4"), "max_batch = '4': expected int"),
        (lambda: EngineConfig(prefill_buckets=64), "prefill_buckets = 64: expected a list"),
        (lambda: DTypeConfig(params=None), "params = None: expected one of 'float32'"),
        (lambda: MeshConfig(model=2.0), "model = 2.0: expected int"),
        (lambda: RuntimeConfig(engine=8), "engine = 8: expected a table"),
        (lambda: LoraConfig(rank=4, alpha="x"), "alpha = 'x': expected float"),
        (lambda: LoraConfig(rank=4, alpha=float("nan")), "alpha = nan: expected a finite number"),
        (lambda: LoraConfig(rank=0, alpha=1), "rank = 0: must be positive"),
    ],
)
def test_direct_construction_is_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_direct_construction_coerces() -> None:
    assert EngineConfig(prefill_buckets=[64, 128]).prefill_buckets == (64, 128)
    assert isinstance(LoraConfig(rank=4, alpha=8).alpha, float)


@pytest.mark.parametrize("load", [RuntimeConfig.load, ModelConfig.load, ModelConfig.from_toml])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[engine", "not valid TOML"),
        (b"\xff", "not valid TOML .*utf-8"),
        (b"[engine]\nmax_bach = 1", "unknown setting"),
        (b"engine = 1\ntext = 1\n", "engine (= 1: expected a table|is an unknown)|text (= 1|is an unknown)"),
        (None, "no such file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, load: Callable, content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"bad\.toml: .*({message})"):
        load(path)


def test_a_preset_is_no_model() -> None:
    with pytest.raises(ConfigError, match="cpu.toml: dtypes is an unknown setting; valid settings: text, vision"):
        ModelConfig.from_toml(MODEL_TOML.parents[1] / "cpu.toml")


def test_an_override_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[engine]\nmax_batch = 3\n")
    with pytest.raises(ConfigError, match="^engine.max_batch = 0"):
        RuntimeConfig.load(path, engine={"max_batch": 0})


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'gpu'; available: auto, cpu, gpu_hopper"):
        RuntimeConfig.load("gpu")


@pytest.mark.parametrize(
    ("platform", "kind", "count", "preset", "reason"),
    [
        ("cpu", "cpu", 8, "cpu", "any CPU"),
        ("gpu", "NVIDIA H200", 1, "gpu_hopper", "bfloat16 units"),
        ("cuda", "NVIDIA A100-SXM4-40GB", 1, "gpu_hopper", "bfloat16 units"),
        ("gpu", "NVIDIA L4", 1, "gpu_hopper", "bfloat16 units"),
        ("gpu", "NVIDIA GeForce RTX 3090", 1, "gpu_hopper", "bfloat16 units"),
        ("gpu", "NVIDIA RTX 6000 Ada Generation", 1, "gpu_hopper", "bfloat16 units"),
        ("rocm", "AMD Instinct MI300X", 1, "gpu_hopper", "bfloat16 units"),
        ("gpu", "Tesla T4", 1, "gpu_t4", "no bfloat16 units"),
        ("gpu", "NVIDIA T4", 1, "gpu_t4", "no bfloat16 units"),
        ("gpu", "Tesla V100-SXM2-16GB", 1, "gpu_t4", "no bfloat16 units"),
        ("gpu", "Tesla P100-PCIE-16GB", 1, "gpu_t4", "no bfloat16 units"),
        ("gpu", "NVIDIA GeForce GTX 1080 Ti", 1, "gpu_t4", "no bfloat16 units"),
        ("gpu", "NVIDIA GeForce RTX 2080 SUPER", 1, "gpu_t4", "no bfloat16 units"),
        ("gpu", "Quadro RTX 6000", 1, "gpu_t4", "no bfloat16 units"),
        ("tpu", "TPU v5 lite", 1, "tpu_v5e_1", "16 GB class, fewer than 8 chips"),
        ("tpu", "TPU v5 lite", 8, "tpu_v5e_8", "16 GB class, 8 chips or more"),
        ("tpu", "TPU v5", 4, "tpu_v5p", "32 GB or more"),
        ("tpu", "TPU v5p", 4, "tpu_v5p", "32 GB or more"),
        ("tpu", "TPU v4", 4, "tpu_v5p", "32 GB or more"),
        ("tpu", "TPU7x", 4, "tpu_v5p", "32 GB or more"),
        ("tpu", "TPU v6 lite", 1, "tpu_v6e", "32 GB class"),
    ],
)
def test_auto_picks_by_device_and_says_so(
    platform: str, kind: str, count: int, preset: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert RuntimeConfig.auto(platform, kind, count) == RuntimeConfig.load(preset)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().startswith(f"preset {preset}: {count} x {kind} (")
    assert reason in record.getMessage()


@pytest.mark.parametrize(
    ("platform", "kind", "preset"),
    [
        ("tpu", "TPU v3", "tpu_v5e_1"),
        ("tpu", "TPU v4 lite", "tpu_v5e_1"),
        ("tpu", "TPU v9", "tpu_v5e_1"),
        ("x", "y", "cpu"),
    ],
)
def test_auto_warns_of_an_unknown_device(
    platform: str, kind: str, preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert RuntimeConfig.auto(platform, kind, 8) == RuntimeConfig.load(preset)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"preset {preset}: 8 x {kind} (" in caplog.text and "unknown" in caplog.text


def test_auto_asks_jax_for_what_it_is_not_told() -> None:
    import jax

    device = jax.devices()[0]
    told = RuntimeConfig.auto(device.platform, device.device_kind, len(jax.devices()), engine={"max_batch": 2})
    assert RuntimeConfig.auto(engine={"max_batch": 2}) == told
    assert RuntimeConfig.load("auto", engine={"max_batch": 2}) == told


def test_auto_needs_no_jax_when_told() -> None:
    auto = "from phi4mm_jax.config import RuntimeConfig; RuntimeConfig.auto('cpu', 'cpu', 1)"
    code = f"{auto}; import sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


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


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text", {"num_heads": 7}, "hidden_size = 3072: must be a multiple of num_heads 7"),
        ("text", {"short_factor": (1.0,)}, r"short_factor = \(1.0,\): expected 48 positive numbers, got 1"),
        ("text", {"long_factor": (0.0,) * 48}, "long_factor = .*: expected 48 positive numbers"),
        ("text", {"hidden_size": 0}, "hidden_size = 0: must be positive"),
        ("text", {"original_max_position_embeddings": 1}, "original_max_position_embeddings = 1: must be at least 2"),
        ("text", {"max_position_embeddings": 4095}, "max_position_embeddings = 4095: must be at least original"),
        ("text", {"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5: expected a share"),
        ("vision", {"image_size": 450}, "image_size = 450: must be a multiple of 2 x patch_size 14"),
        ("vision", {"feature_layer": 28}, "feature_layer = 28: expected the output of one of 27 layers"),
        ("vision", {"feature_layer": -28}, "feature_layer = -28"),
        ("audio", {"kernel_size": 0}, "kernel_size = 0: must be positive"),
        ("audio", {"time_reduction": 4}, "time_reduction = 4: only 8 is supported"),
        ("tokens", {"eos": ()}, r"eos = \(\): expected 1 to 8 token ids"),
    ],
)
def test_bad_model_values(released: ModelConfig, part: str, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        dataclasses.replace(getattr(released, part), **changes)


@pytest.mark.parametrize("changes", [{"pad": 10**9}, {"image": 200064}, {"audio": -1}, {"eos": (1, 200064)}])
def test_token_ids_lie_in_the_vocabulary(released: ModelConfig, changes: dict) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match=f"^tokens.{name} = .*: expected an id below vocab_size 200064"):
        dataclasses.replace(released, tokens=dataclasses.replace(released.tokens, **changes))


def test_load_takes_a_name_a_file_or_a_directory(released: ModelConfig, tmp_path: Path) -> None:
    assert models() == ["nano", "phi4mm"]
    assert ModelConfig.load(MODEL_TOML) == ModelConfig.load(str(MODEL_TOML)) == released
    assert ModelConfig.load(GOLDEN / "hub") == ModelConfig.from_checkpoint(GOLDEN / "hub")
    with pytest.raises(ConfigError, match="no such file; expected a checkpoint directory"):
        ModelConfig.load(tmp_path / "phi4mm")


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
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON .*utf-8"),
        (b"[1]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b"{}", "model_type is missing"),
        (b'{"model_type": "llama"}', "model_type = 'llama': expected phi4mm or phi4_multimodal"),
        (b'{"model_type": ["phi4mm"]}', "model_type = .*: expected phi4mm"),
        (b'{"model_type": "phi4mm"}', "vocab_size is missing"),
    ],
)
def test_bad_checkpoint_directory(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"config\.json: {message}"):
        ModelConfig.from_checkpoint(tmp_path)


def test_unreadable_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read \(Is a directory\)"):
        ModelConfig.from_checkpoint(tmp_path)


# --- every setting of a checkpoint's files, changed ----------------------------------------------------------

ABSENT = object()


def hub_files(released: ModelConfig) -> dict[str, Any]:
    """The released model's files, by name, as the hub's layout has them."""
    text, audio = released.text, released.audio
    return {
        "config.json": {
            "model_type": "phi4mm",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "max_position_embeddings": text.max_position_embeddings,
            "original_max_position_embeddings": text.original_max_position_embeddings,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": 10000,
            "partial_rotary_factor": text.partial_rotary_factor,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1] * 48,
                "long_factor": list(text.long_factor),
            },
            "sliding_window": 262144,
            "pad_token_id": 199999,
            "eos_token_id": 199999,
            "embd_layer": {"image_embd_layer": {"crop_size": 448}},
            "audio_processor": {
                "config": {
                    "attention_dim": audio.hidden_size,
                    "linear_units": audio.intermediate_size,
                    "num_blocks": audio.num_layers,
                    "attention_heads": audio.num_heads,
                    "nemo_conv_settings": {"conv_channels": audio.conv_channels},
                    "relative_attention_bias_args": {"t5_bias_max_distance": audio.bias_max_distance},
                    "input_size": audio.input_size,
                    "kernel_size": audio.kernel_size,
                    "time_reduction": audio.time_reduction,
                }
            },
            "vision_lora": {"r": 256, "lora_alpha": 512},
            "speech_lora": {"r": 320, "lora_alpha": 640},
        },
        "generation_config.json": {"eos_token_id": [200020, 199999]},
        "preprocessor_config.json": {"dynamic_hd": 36},
    }


def native_files(released: ModelConfig) -> dict[str, Any]:
    """The golden checkpoint's files, by name: transformers' layout."""
    del released
    directory = GOLDEN / "native"
    return {str(p.relative_to(directory)): json.loads(p.read_text()) for p in directory.rglob("*config.json")}


def read_with(directory: Path, files: dict[str, Any], reference: str, value: Any) -> ModelConfig:
    """Reads a checkpoint in which the value of `reference`, `file#key.key`, is another."""
    file, _, keys = reference.rpartition("#")
    files = copy.deepcopy(files)
    content = files.setdefault(file or "config.json", {})
    *tables, last = keys.split(".")
    for table in tables:
        content = content.setdefault(table, {})
    if value is ABSENT:
        del content[last]
    else:
        content[last] = value
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return ModelConfig.from_checkpoint(directory)


def assert_refused(directory: Path, files: dict[str, Any], reference: str, value: Any, message: str = "") -> None:
    with pytest.raises(ConfigError) as error:
        read_with(directory, files, reference, value)
    file, _, keys = reference.rpartition("#")
    start = f"{directory / (file or 'config.json')}: {keys}"
    assert str(error.value).startswith(start) and message in str(error.value)


def leaves(table: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of all that is no table."""
    found = []
    for key, value in table.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found


def test_files_of_this_test_are_good(released: ModelConfig, tmp_path: Path) -> None:
    assert read_with(tmp_path, hub_files(released), "torch_dtype", "bfloat16") == released


def test_no_dimension_takes_another_type(released: ModelConfig, tmp_path: Path) -> None:
    files = hub_files(released)
    others = {"model_type", "sliding_window", "eos_token_id", "rope_scaling.type"}
    for key in sorted(set(leaves(files["config.json"])) - others):
        for value in ("x", [], {}, True, float("nan")):
            assert_refused(tmp_path, files, key, value)
        for value in (None, ABSENT) if key != "embd_layer.image_embd_layer.crop_size" else ():
            assert_refused(tmp_path, files, key, value, "is missing")


@pytest.mark.parametrize(
    ("reference", "value", "message"),
    [
        ("num_hidden_layers", 2.5, "= 2.5: expected int"),
        ("vocab_size", 1e9, "= 1000000000.0: expected int"),
        ("rms_norm_eps", "x", "= 'x': expected float"),
        ("rms_norm_eps", 10**400, "expected a finite number"),
        ("hidden_size", 10**30, "expected an integer of 32 bits"),
        ("pad_token_id", 10**9, "= 1000000000: expected an id below vocab_size 200064"),
        ("rope_scaling.long_factor", ["x"] * 48, "[0] = 'x': expected float"),
        ("vision_lora.r", 0, "= 0: must be positive"),
        ("vision_lora.r", "8", "= '8': expected int"),
        ("audio_processor.config.kernel_size", 0, "= 0: must be positive"),
        ("audio_processor.config.time_reduction", 4, "= 4: only 8 is supported"),
        ("generation_config.json#eos_token_id", "x", "= 'x': expected a list"),
        ("generation_config.json#eos_token_id", list(range(20)), "expected 1 to 8 token ids"),
        ("generation_config.json#eos_token_id", [], "expected 1 to 8 token ids"),
        ("generation_config.json#eos_token_id", ["x"], "[0] = 'x': expected int"),
        ("preprocessor_config.json#dynamic_hd", 0, "= 0: must be positive"),
        ("preprocessor_config.json#audio_feat_stride", 2, "= 2: only 1 is supported"),
        ("embd_layer.image_embd_layer.crop_size", 450, "= 450: must be a multiple"),
        ("tie_word_embeddings", False, "= False: only True is supported"),
        ("hidden_act", "gelu", "= 'gelu': only 'silu' is supported"),
        ("attention_bias", True, "only False"),
        ("mlp_bias", True, "only False"),
        ("lm_head_bias", True, "only False"),
        ("sliding_window", 131071, "= 131071: expected null or at least 131072"),
        ("sliding_window", "x", "= 'x': expected null or at least 131072"),
        ("rope_scaling.type", "yarn", "= 'yarn': only 'longrope' is supported"),
        ("embd_layer.embedding_cls", "image", "only 'image_audio'"),
        ("embd_layer.image_embd_layer.hd_transform_order", "glb_sub", "only 'sub_glb'"),
        ("embd_layer.image_embd_layer.image_token_compression_cls", "none", "only 'avg_pool_2d'"),
        ("embd_layer.image_embd_layer.use_hd_transform", False, "only True"),
        ("embd_layer.image_embd_layer.with_learnable_separator", False, "only True"),
        ("embd_layer.audio_embd_layer.compression_rate", 4, "only 8"),
        ("embd_layer.audio_embd_layer.use_qformer", True, "only False"),
        ("audio_processor.name", "other", "only 'cascades'"),
        ("audio_processor.config.causal", False, "only True"),
        ("audio_processor.config.bias_in_glu", False, "only True"),
        ("audio_processor.config.batch_norm", True, "only False"),
        ("audio_processor.config.activation", "gelu", "only 'swish'"),
        ("audio_processor.config.conv_activation", "gelu", "only 'swish'"),
        ("audio_processor.config.conv_glu_type", "gelu", "only 'swish'"),
        ("audio_processor.config.input_layer", "conv2d", "only 'nemo_conv'"),
        ("audio_processor.config.depthwise_multiplier", 2, "only 1"),
        ("audio_processor.config.relative_attention_bias_args.type", "alibi", "only 't5'"),
        ("audio_processor.config.ext_pw_out_channel", 7, "= 7: expected 1024, the value of audio_processor.config.att"),
        ("_tiny_overrides.vision.hidden_act", "gelu", "only 'gelu_pytorch_tanh'"),
        ("_tiny_overrides.vision.image_size", 224, "= 224: expected 448, the value of embd_layer"),
        ("_tiny_overrides", 3, "= 3: expected a table"),
        ("rope_scaling", "x", "= 'x': expected a table"),
        ("rope_scaling", None, ".short_factor is missing"),
        ("vision_lora", None, ".r is missing"),
        ("vision_lora", [1], "= [1]: expected a table"),
        ("embd_layer", "x", "= 'x': expected a table"),
    ],
)
def test_bad_values_of_the_hub_layout(
    released: ModelConfig, tmp_path: Path, reference: str, value: Any, message: str
) -> None:
    assert_refused(tmp_path, hub_files(released), reference, value, message)


@pytest.mark.parametrize(
    ("reference", "value", "message"),
    [
        ("hidden_act", "gelu", "only 'silu'"),
        ("sliding_window", 511, "at least 512"),
        ("rope_parameters.rope_type", "default", "only 'longrope'"),
        ("rope_parameters.original_max_position_embeddings", 32, "expected 64, the value of original"),
        ("rope_parameters.rope_theta", None, "is missing"),
        ("vision_config.hidden_act", "gelu", "only 'gelu_pytorch_tanh'"),
        ("vision_config.crop_size", 112, "expected 56, the value of vision_config.image_size"),
        ("vision_config.num_hidden_layers", "2", "= '2': expected int"),
        ("audio_config.bias_max_distance", None, "is missing"),
        ("audio_config.bias_symmetric", True, "only False"),
        ("audio_config.nemo_activation", "gelu", "only 'relu'"),
        ("audio_config", "x", "= 'x': expected a table"),
        ("audio_config.audio_token_id", 512, "expected an id below vocab_size 512"),
        ("vision-lora/adapter_config.json#lora_alpha", "x", "= 'x': expected float"),
        ("vision-lora/adapter_config.json#r", ABSENT, "is missing"),
        ("speech-lora/adapter_config.json#use_rslora", True, "only False"),
        ("speech-lora/adapter_config.json#rank_pattern", {"qkv": 4}, "only {}"),
    ],
)
def test_bad_values_of_the_native_layout(
    released: ModelConfig, tmp_path: Path, reference: str, value: Any, message: str
) -> None:
    assert_refused(tmp_path, native_files(released), reference, value, message)


@pytest.mark.parametrize("name", ["generation_config.json", "preprocessor_config.json"])
def test_companion_files_must_be_objects(released: ModelConfig, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected a JSON object, got list"):
        read_with(tmp_path, hub_files(released) | {name: [1]}, "use_cache", True)


def test_missing_adapter_file(released: ModelConfig, tmp_path: Path) -> None:
    files = {name: content for name, content in native_files(released).items() if "speech-lora" not in name}
    with pytest.raises(ConfigError, match=r"speech-lora/adapter_config\.json: no such file"):
        read_with(tmp_path, files, "use_cache", True)


def test_null_is_absent(released: ModelConfig, tmp_path: Path) -> None:
    files = hub_files(released)
    assert read_with(tmp_path, files, "sliding_window", None) == released
    assert read_with(tmp_path, files, "generation_config.json#eos_token_id", None) == released
    assert read_with(tmp_path, files, "preprocessor_config.json#dynamic_hd", None) == released


def test_end_of_answer_ids_of_config_json(released: ModelConfig, tmp_path: Path) -> None:
    files = hub_files(released)
    del files["generation_config.json"]
    assert read_with(tmp_path, files, "use_cache", True).tokens.eos == (200020, 199999)
    assert_refused(tmp_path, files, "eos_token_id", None, "is missing")


def test_end_of_answer_ids_may_be_one_number(released: ModelConfig, tmp_path: Path) -> None:
    files = hub_files(released)
    assert read_with(tmp_path, files, "generation_config.json#eos_token_id", 200020).tokens.eos == (200020,)


def test_rope_settings_of_older_transformers(released: ModelConfig, tmp_path: Path) -> None:
    files = native_files(released)
    expected = read_with(tmp_path, files, "use_cache", True)
    rope = files["config.json"].pop("rope_parameters")
    files["config.json"] |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope["type"] = rope.pop("rope_type")
    assert read_with(tmp_path, files, "rope_scaling", rope) == expected
