"""The one configuration system: what the model is (`ModelConfig`) and how it is run (`RuntimeConfig`).

Both are frozen, validated dataclasses. A `ModelConfig` is read from a checkpoint's own `config.json`; a
`RuntimeConfig` comes from a TOML preset in `configs/`, changed by `--set engine.max_batch=8` or by keyword.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A configuration is malformed; the message names the field and what is accepted."""


# --- building dataclasses from plain mappings ----------------------------------------------------------------


def _coerce(value: Any, annotation: Any, where: str) -> Any:
    """Returns `value` as `annotation` (a type built of dataclasses, tuples, literals and scalars)."""
    if dataclasses.is_dataclass(annotation):
        return value if isinstance(value, annotation) else _build(annotation, value, where)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (annotation,) = [a for a in arguments if a is not type(None)]
        return _coerce(value, annotation, where)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} = {value!r}: expected one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} = {value!r}: expected a list")
        return tuple(_coerce(v, arguments[0], f"{where}[{i}]") for i, v in enumerate(value))
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, annotation) or (isinstance(value, bool) and annotation is not bool):
        raise ConfigError(f"{where} = {value!r}: expected {annotation.__name__}")
    return value


def _build(cls: type, values: Any, where: str = "") -> Any:
    """Builds dataclass `cls` from a mapping; an unknown key is an error that names the nearest valid one."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__}: expected a table of settings, got {values!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"valid keys: {', '.join(names)}"
            raise ConfigError(f"unknown setting {prefix}{key}; {hint}")
    try:
        return cls(**{k: _coerce(v, hints[k], f"{prefix}{k}") for k, v in values.items()})
    except TypeError as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from None


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ConfigError(f"{type(config).__name__}.{name} = {getattr(config, name)}: must be positive")


# --- the model -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The decoder (phi4mm-reference, section 2)."""

    vocab_size: int
    """Rows of the tied embedding and output head."""
    hidden_size: int
    """Width D of the residual stream."""
    intermediate_size: int
    """Width F of the gated MLP."""
    num_layers: int
    """Decoder layers."""
    num_heads: int
    """Query heads N."""
    num_kv_heads: int
    """Key/value heads K; N / K query heads share one."""
    max_position_embeddings: int
    """Longest supported sequence, in tokens."""
    original_max_position_embeddings: int
    """Longest sequence under the short rope factors, in tokens."""
    short_factor: tuple[float, ...]
    """Rope frequency divisors up to `original_max_position_embeddings`; one per rotated pair."""
    long_factor: tuple[float, ...]
    """Rope frequency divisors beyond it."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    partial_rotary_factor: float = 1.0
    """Share of each head's dimensions that rotates."""
    rms_norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""

    def __post_init__(self) -> None:
        _positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        if self.hidden_size % self.num_heads or self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"TextConfig: hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}, "
                f"and that of num_kv_heads {self.num_kv_heads}"
            )
        if self.intermediate_size % self.num_kv_heads:
            raise ConfigError(f"TextConfig.intermediate_size must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.max_position_embeddings < self.original_max_position_embeddings:
            raise ConfigError("TextConfig.max_position_embeddings is below original_max_position_embeddings")
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != self.rotary_dim // 2:
                raise ConfigError(
                    f"TextConfig.{name} has {len(getattr(self, name))} values; expected {self.rotary_dim // 2}"
                )

    @property
    def head_dim(self) -> int:
        """Width H of one head."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions rotate."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def rope_scale(self) -> float:
        """Factor on cos and sin, in both regimes (longrope)."""
        ratio = self.max_position_embeddings / self.original_max_position_embeddings
        return 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(self.original_max_position_embeddings))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The SigLIP NaViT tower and the dynamic-HD cropping (phi4mm-reference, section 4)."""

    hidden_size: int
    """Width of the tower."""
    intermediate_size: int
    """Width of its MLP."""
    num_layers: int
    """Layers in the checkpoint; those after `feature_layer` are never run."""
    num_heads: int
    """Attention heads."""
    image_size: int
    """Side of a square crop, in pixels."""
    patch_size: int
    """Side of a patch, in pixels."""
    max_crops: int = 36
    """Most crops that an image is cut into, the global view not counted."""
    feature_layer: int = -2
    """Which hidden state feeds the projector; -2 is the output of the last layer but one."""
    layer_norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""

    def __post_init__(self) -> None:
        _positive(self, "hidden_size", "intermediate_size", "num_layers", "num_heads", "image_size", "patch_size")
        _positive(self, "max_crops", "num_used_layers")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"VisionConfig.hidden_size must be a multiple of num_heads {self.num_heads}")
        if self.image_size % (2 * self.patch_size):
            raise ConfigError(f"VisionConfig.image_size must be a multiple of twice patch_size {self.patch_size}")

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a crop."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_side(self) -> int:
        """Tokens along one side of a crop, after the 2x2 pooling."""
        return self.patches_per_side // 2

    @property
    def tokens_per_crop(self) -> int:
        """Tokens of one crop, separators not counted."""
        return self.tokens_per_side**2

    @property
    def num_used_layers(self) -> int:
        """Layers that the used feature depends on."""
        return self.num_layers + 1 + self.feature_layer if self.feature_layer < 0 else self.feature_layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """The speech conformer (phi4mm-reference, section 5)."""

    hidden_size: int
    """Width of the conformer."""
    intermediate_size: int
    """Width of the gated feed-forward."""
    num_layers: int
    """Conformer blocks."""
    num_heads: int
    """Attention heads."""
    conv_channels: int
    """Channels of the convolutional subsampling."""
    bias_max_distance: int
    """Half the rows of the relative-position bias table."""
    input_size: int = 80
    """Mel bins."""
    kernel_size: int = 3
    """Taps of the causal depthwise convolution."""
    time_reduction: int = 8
    """Frames per audio token."""
    window: int = 500
    """Sub-frames that see each other; longer audio is folded into windows."""
    layer_norm_eps: float = 1e-5
    """Epsilon of every LayerNorm."""

    def __post_init__(self) -> None:
        _positive(self, "hidden_size", "intermediate_size", "num_layers", "num_heads", "conv_channels", "input_size")
        if self.time_reduction != 8:
            raise ConfigError(f"AudioConfig.time_reduction = {self.time_reduction}: only 8 is supported")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"AudioConfig.hidden_size must be a multiple of num_heads {self.num_heads}")

    @property
    def window_frames(self) -> int:
        """Log-mel frames of one attention window."""
        return self.window * self.time_reduction

    def num_tokens(self, num_frames: int) -> int:
        """Audio tokens of `num_frames` log-mel frames."""
        return -(-num_frames // self.time_reduction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """One low-rank adapter of the decoder (phi4mm-reference, section 3)."""

    rank: int
    """Rank r."""
    alpha: float
    """The adapter's output is multiplied by alpha / rank."""

    @property
    def scale(self) -> float:
        """Factor on the adapter's output."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """Token ids that the model itself gives a meaning (phi4mm-reference, section 6)."""

    image: int
    """Placeholder of one image token."""
    audio: int
    """Placeholder of one audio token."""
    pad: int
    """Padding."""
    eos: tuple[int, ...]
    """Ids that end a generation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every dimension and constant of one checkpoint."""

    text: TextConfig
    """The decoder."""
    vision: VisionConfig
    """The image encoder."""
    audio: AudioConfig
    """The speech encoder."""
    vision_lora: LoraConfig
    """Adapter of rows with an image."""
    speech_lora: LoraConfig
    """Adapter of rows with speech and no image."""
    tokens: TokenConfig
    """Special token ids."""

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Reads a model description such as `configs/model/phi4mm.toml`."""
        return _build(cls, _read_toml(Path(path)))

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> Self:
        """Reads `config.json` of a checkpoint directory, in the hub's or transformers' layout.

        Raises:
          ConfigError: the file is missing, is of another model, or lacks a value.
        """
        directory = Path(directory)
        raw = _read_json(directory / "config.json", required=True)
        readers = {"phi4mm": _from_hub, "phi4_multimodal": _from_native}
        kind = raw.get("model_type")
        if kind not in readers:
            raise ConfigError(f"{directory / 'config.json'}: model_type is {kind!r}; expected {' or '.join(readers)}")
        generation = _read_json(directory / "generation_config.json")
        preprocessor = _read_json(directory / "preprocessor_config.json")
        try:
            return readers[kind](directory, raw, generation, preprocessor)
        except KeyError as error:
            raise ConfigError(f"{directory / 'config.json'}: missing key {error}") from None


def _read_json(path: Path, required: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if required:
            raise ConfigError(f"{path}: no such file; expected a checkpoint directory with config.json")
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from None


def _ids(value: int | Iterable[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _text_config(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> TextConfig:
    """The decoder's part, whose keys both layouts share; `rope` holds what they keep apart."""
    if rope.get("type", rope.get("rope_type")) != "longrope":
        raise ConfigError(f"config.json: rope type {rope.get('type', rope.get('rope_type'))!r}; expected 'longrope'")
    return TextConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        max_position_embeddings=raw["max_position_embeddings"],
        original_max_position_embeddings=raw["original_max_position_embeddings"],
        short_factor=tuple(map(float, rope["short_factor"])),
        long_factor=tuple(map(float, rope["long_factor"])),
        rope_theta=float(rope["rope_theta"]),
        partial_rotary_factor=float(rope["partial_rotary_factor"]),
        rms_norm_eps=raw["rms_norm_eps"],
    )


# What the original's remote code hard-codes, so that the hub's config.json does not say it.
_HUB_CONSTANTS = {"image_token_id": 200010, "audio_token_id": 200011, "end_token_id": 200020, "dynamic_hd": 36}
_SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "feature_layer": -2,
}


def _vision_config(vision: Mapping[str, Any], max_crops: int) -> VisionConfig:
    return VisionConfig(
        hidden_size=vision["hidden_size"],
        intermediate_size=vision["intermediate_size"],
        num_layers=vision["num_hidden_layers"],
        num_heads=vision["num_attention_heads"],
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        feature_layer=vision["feature_layer"],
        layer_norm_eps=vision["layer_norm_eps"],
        max_crops=max_crops,
    )


def _from_hub(
    directory: Path, raw: dict[str, Any], generation: dict[str, Any], preprocessor: dict[str, Any]
) -> ModelConfig:
    overrides = raw.get("_tiny_overrides", {})
    constants = _HUB_CONSTANTS | overrides
    if "dynamic_hd" not in overrides:
        constants["dynamic_hd"] = preprocessor.get("dynamic_hd", constants["dynamic_hd"])
    crop_size = raw["embd_layer"]["image_embd_layer"]["crop_size"]
    audio = raw["audio_processor"]["config"]
    rope = {k: raw[k] for k in ("rope_theta", "partial_rotary_factor")} | raw["rope_scaling"]
    eos = generation.get("eos_token_id", [constants["end_token_id"], raw["eos_token_id"]])
    return ModelConfig(
        text=_text_config(raw, rope),
        vision=_vision_config(
            _SIGLIP | {"image_size": crop_size} | overrides.get("vision", {}), max_crops=constants["dynamic_hd"]
        ),
        audio=AudioConfig(
            hidden_size=audio["attention_dim"],
            intermediate_size=audio["linear_units"],
            num_layers=audio["num_blocks"],
            num_heads=audio["attention_heads"],
            conv_channels=audio["nemo_conv_settings"]["conv_channels"],
            bias_max_distance=audio["relative_attention_bias_args"]["t5_bias_max_distance"],
            input_size=audio["input_size"],
            kernel_size=audio["kernel_size"],
            time_reduction=audio["time_reduction"],
        ),
        vision_lora=LoraConfig(rank=raw["vision_lora"]["r"], alpha=float(raw["vision_lora"]["lora_alpha"])),
        speech_lora=LoraConfig(rank=raw["speech_lora"]["r"], alpha=float(raw["speech_lora"]["lora_alpha"])),
        tokens=TokenConfig(
            image=constants["image_token_id"],
            audio=constants["audio_token_id"],
            pad=raw["pad_token_id"],
            eos=_ids(eos),
        ),
    )


def _from_native(
    directory: Path, raw: dict[str, Any], generation: dict[str, Any], preprocessor: dict[str, Any]
) -> ModelConfig:
    rope = raw.get("rope_parameters") or raw["rope_scaling"]
    rope = {k: raw[k] for k in ("rope_theta", "partial_rotary_factor") if k in raw} | rope
    vision, audio = _SIGLIP | raw["vision_config"], raw["audio_config"]

    def lora(name: str) -> LoraConfig:
        adapter = _read_json(directory / f"{name}-lora" / "adapter_config.json", required=True)
        return LoraConfig(rank=adapter["r"], alpha=float(adapter["lora_alpha"]))

    return ModelConfig(
        text=_text_config(raw, rope),
        vision=_vision_config(vision, max_crops=preprocessor.get("dynamic_hd", _HUB_CONSTANTS["dynamic_hd"])),
        audio=AudioConfig(
            hidden_size=audio["hidden_size"],
            intermediate_size=audio["intermediate_size"],
            num_layers=audio["num_blocks"],
            num_heads=audio["num_attention_heads"],
            conv_channels=audio["nemo_conv_channels"],
            bias_max_distance=audio["bias_max_distance"],
            input_size=audio["input_size"],
            kernel_size=audio["kernel_size"],
            time_reduction=audio["time_reduction"],
        ),
        vision_lora=lora("vision"),
        speech_lora=lora("speech"),
        tokens=TokenConfig(
            image=vision["image_token_id"],
            audio=audio["audio_token_id"],
            pad=raw["pad_token_id"],
            eos=_ids(generation.get("eos_token_id", raw["eos_token_id"])),
        ),
    )


# --- how it is run -------------------------------------------------------------------------------------------

DType = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DTypeConfig:
    """Number formats."""

    params: DType = "bfloat16"
    """Weights as they lie in memory."""
    activations: DType = "bfloat16"
    """The residual stream; products accumulate in float32 whatever this is."""
    kv_cache: Literal["float32", "bfloat16", "float16", "bfloat16_bits"] = "bfloat16"
    """Keys and values; `bfloat16_bits` is bfloat16 held as uint16, which XLA:CPU updates in place."""
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """Passes of a float32 product on TPU and GPU; `highest` is true float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged."""

    data: int = 1
    """Devices over which the rows of a batch are spread."""
    model: int = 1
    """Devices over which heads, MLP columns and the vocabulary are spread."""

    def __post_init__(self) -> None:
        _positive(self, "data", "model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Static shapes and limits: everything that decides what is compiled."""

    max_batch: int = 8
    """Most rows that decode together; further requests wait for a free row."""
    max_seq_len: int = 131072
    """Most tokens of one sequence, prompt and answer together; memory is taken by need, not by this limit."""
    batch_buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Row counts that decode is compiled for."""
    cache_buckets: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 132096)
    """Cache lengths in tokens; the last leaves room beyond the longest context for padding."""
    prefill_buckets: tuple[int, ...] = (64, 256, 1024)
    """Chunk lengths of a prompt, in tokens; the largest is the most that one prefill call takes."""
    prefill_call_cost: int = 256
    """What a prefill call costs beyond its tokens, in tokens: splitting a prompt further saves padding but reads the
    weights once more."""
    prefill_rows: int = 1
    """Most prompts that one prefill call takes."""
    crop_buckets: tuple[int, ...] = (1, 2, 4, 8)
    """Crops per image-encoder call; the crops of a batch are split into such calls without padding."""
    window_buckets: tuple[int, ...] = (1, 2, 4, 8)
    """Windows (40 s of speech at most) per speech-encoder call, likewise."""
    audio_buckets: tuple[int, ...] = (256, 512, 1024, 2048, 4000)
    """Log-mel frames of a window, in multiples of 8."""
    decode_steps: int = 16
    """Most tokens per row and dispatch."""
    stream_steps: int = 1
    """The same while a caller is streaming."""
    prefill_block: int = 256
    """Query and key block of the blockwise prefill attention."""

    def __post_init__(self) -> None:
        _positive(self, "max_batch", "max_seq_len", "prefill_rows", "decode_steps", "stream_steps", "prefill_block")
        for name in (f.name for f in dataclasses.fields(self) if f.name.endswith("_buckets")):
            buckets = getattr(self, name)
            if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] <= 0:
                raise ConfigError(f"engine.{name} = {list(buckets)}: expected increasing positive integers")
        for name in ("batch_buckets", "crop_buckets", "window_buckets"):
            if getattr(self, name)[0] != 1:
                raise ConfigError(f"engine.{name} = {list(getattr(self, name))}: must begin with 1")
        if any(frames % 8 for frames in self.audio_buckets):
            raise ConfigError(f"engine.audio_buckets = {list(self.audio_buckets)}: expected multiples of 8")
        if self.prefill_call_cost < 0:
            raise ConfigError(f"engine.prefill_call_cost = {self.prefill_call_cost}: must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How a model is run on one kind of device."""

    dtypes: DTypeConfig = DTypeConfig()
    """Number formats."""
    mesh: MeshConfig = MeshConfig()
    """Device arrangement."""
    engine: EngineConfig = EngineConfig()
    """Shapes and limits."""

    @classmethod
    def load(cls, preset: str | Path, **sections: Mapping[str, Any]) -> Self:
        """Reads a preset by name (`"cpu"`) or a TOML file by path; `engine={"max_batch": 8}` overrides.

        Raises:
          ConfigError: no such preset, an unknown key, or a value out of range.
        """
        path = Path(preset)
        if path.suffix != ".toml":
            path = _config_directory() / f"{preset}.toml"
            if not path.is_file():
                raise ConfigError(f"unknown preset {str(preset)!r}; available: auto, {', '.join(presets())}")
        return _build(cls, _merge(_read_toml(path), sections))

    @classmethod
    def auto(cls, platform: str, device_kind: str, num_devices: int = 1, **sections: Mapping[str, Any]) -> Self:
        """Picks the preset of a device and logs which and why.

        Args:
          platform: `jax.Device.platform`: cpu, gpu or tpu.
          device_kind: `jax.Device.device_kind`, such as "TPU v5 lite" or "NVIDIA H200".
          num_devices: devices to use.
          **sections: overrides, as in `load`.
        """
        name = _preset_for(platform, device_kind, num_devices)
        logger.info("preset %s for %d x %s (%s)", name, num_devices, device_kind, platform)
        return cls.load(name, **sections)

    def override(self, **sections: Mapping[str, Any]) -> Self:
        """Returns a copy with some settings changed: `override(engine={"max_batch": 8})`."""
        return _build(type(self), _merge(dataclasses.asdict(self), sections))


def presets() -> list[str]:
    """Names of the shipped runtime presets."""
    return sorted(p.stem for p in _config_directory().glob("*.toml"))


def parse_settings(settings: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Parses `--set a.b=value` arguments into the sections that `RuntimeConfig.load` takes.

    Values are TOML (`8`, `true`, `[1, 2]`); anything else is a string.
    """
    sections: dict[str, dict[str, Any]] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and dot and section and name):
            raise ConfigError(f"--set {setting}: expected section.name=value, such as engine.max_batch=8")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        sections.setdefault(section, {})[name] = value
    return sections


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _config_directory() -> Path:
    """Where the presets lie: inside the installed package, or at the root of a source checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _preset_for(platform: str, device_kind: str, num_devices: int) -> str:
    kind = device_kind.lower()
    if platform == "tpu":
        if "v6" in kind:
            return "tpu_v6e"
        if "v5 lite" in kind or "v5e" in kind:
            return "tpu_v5e_8" if num_devices >= 8 else "tpu_v5e_1"
        return "tpu_v5p"
    if platform in ("gpu", "cuda", "rocm"):
        return "gpu_t4" if "t4" in kind else "gpu_hopper"
    return "cpu"
