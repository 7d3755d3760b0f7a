"""How a model is run: number formats, devices, shapes and limits."""

from __future__ import annotations

import dataclasses
import logging
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from phi4mm_jax.config.building import ConfigError, Settings, build, merge, wrong
from phi4mm_jax.config.devices import choose_preset
from phi4mm_jax.config.files import build_from_toml, config_directory
from phi4mm_jax.config.quantization import QuantizationConfig

logger = logging.getLogger(__name__)

DType = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DTypeConfig(Settings):
    """Number formats."""

    params: DType = "bfloat16"
    """Weights as they lie in memory."""
    activations: DType = "bfloat16"
    """The residual stream; products accumulate in float32 whatever this is."""
    kv_cache: Literal["float32", "bfloat16", "float16", "bfloat16_bits", "int8"] = "bfloat16"
    """Keys and values; `bfloat16_bits` is bfloat16 held as uint16, which XLA:CPU updates in place; `int8` has a scale
    for each token and kv head."""
    matmul_precision: Literal["default", "high", "highest"] = "default"
    """Passes of a float32 product on TPU and GPU; `highest` is true float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Settings):
    """How the devices are arranged."""

    data: int = 1
    """Devices over which the rows of a batch are spread."""
    model: int = 1
    """Devices over which heads, MLP columns and the vocabulary are spread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("data", "model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig(Settings):
    """Static shapes and limits: everything that decides what is compiled."""

    max_batch: int = 8
    """Most rows that decode together; further requests wait for a free row."""
    max_seq_len: int = 131072
    """Most tokens of one sequence, prompt and answer together; memory is taken by need, not by this limit."""
    batch_buckets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Row counts that decode is compiled for."""
    cache_buckets: tuple[int, ...] = (1024, 2048, 4096, 8192, 10240, 12288, 16384, 32768, 65536, 132096)
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
    stream_chunk: int = 128
    """Longest chunk of a prompt while callers are streaming, whose tokens wait for it."""
    guessed_tokens: int = 0
    """Tokens that each decode step checks beyond the next one, guessed from what stands earlier in the sequence:
    answers that quote come sooner, and none comes out otherwise."""
    prefill_block: int = 256
    """Query and key block of the blockwise prefill attention."""
    prefix_cache: bool = True
    """Whether what the cache holds of other requests is used where a prompt begins alike."""
    media_cache_mib: int = 128
    """Embeddings of the latest pictures and recordings that are kept for prompts with the same, in MiB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("max_batch", "max_seq_len", "prefill_rows", "decode_steps", "stream_steps")
        self._require_positive("prefill_block", "stream_chunk")
        for name in (f.name for f in dataclasses.fields(self) if f.name.endswith("_buckets")):
            buckets = getattr(self, name)
            if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] <= 0:
                raise wrong(name, list(buckets), "expected increasing positive integers")
        for name in ("batch_buckets", "crop_buckets", "window_buckets"):
            if getattr(self, name)[0] != 1:
                raise wrong(name, list(getattr(self, name)), "must begin with 1")
        if any(frames % 8 for frames in self.audio_buckets):
            raise wrong("audio_buckets", list(self.audio_buckets), "expected multiples of 8")
        for name in ("prefill_call_cost", "media_cache_mib", "guessed_tokens"):
            if getattr(self, name) < 0:
                raise wrong(name, getattr(self, name), "must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuntimeConfig(Settings):
    """How a model is run on one kind of device."""

    dtypes: DTypeConfig = DTypeConfig()
    """Number formats."""
    quantization: QuantizationConfig = QuantizationConfig()
    """Weights in few bits."""
    mesh: MeshConfig = MeshConfig()
    """Device arrangement."""
    engine: EngineConfig = EngineConfig()
    """Shapes and limits."""

    @classmethod
    def load(cls, preset: str | Path, **sections: Mapping[str, Any]) -> Self:
        """Reads a preset by name (`"cpu"`, or `"auto"` for the devices at hand), or a TOML file by path.

        Args:
          preset: name or path.
          **sections: changes to it, such as `engine={"max_batch": 8}`.

        Raises:
          ConfigError: no such preset, an unknown key, or a value out of range.
        """
        if preset == "auto":
            return cls.auto(**sections)
        path = Path(preset)
        if path.suffix != ".toml":
            path = config_directory() / f"{preset}.toml"
            if not path.is_file():
                raise ConfigError(f"unknown preset {str(preset)!r}; available: auto, {', '.join(presets())}")
        return build_from_toml(cls, path).override(**sections)

    @classmethod
    def auto(
        cls,
        platform: str | None = None,
        device_kind: str | None = None,
        num_devices: int | None = None,
        **sections: Mapping[str, Any],
    ) -> Self:
        """Picks the preset of a device and logs which and why.

        Args:
          platform: `jax.Device.platform`: cpu, gpu or tpu. What is None is taken from `jax.devices()`.
          device_kind: `jax.Device.device_kind`, such as "TPU v5 lite" or "NVIDIA H200".
          num_devices: devices to use.
          **sections: overrides, as in `load`.
        """
        if platform is None or device_kind is None or num_devices is None:
            import jax  # here alone: whoever says what the devices are, or reads a preset, needs no JAX

            devices = jax.devices()
            platform = platform or devices[0].platform
            device_kind = device_kind or devices[0].device_kind
            num_devices = num_devices or len(devices)
        choice = choose_preset(platform, device_kind, num_devices)
        level = logging.INFO if choice.known else logging.WARNING
        logger.log(level, "preset %s: %d x %s (%s)", choice.preset, num_devices, device_kind, choice.reason)
        return cls.load(choice.preset, **sections)

    def override(self, **sections: Mapping[str, Any]) -> Self:
        """Returns a copy with some settings changed: `override(engine={"max_batch": 8})`."""
        return build(type(self), merge(dataclasses.asdict(self), sections))


def presets() -> list[str]:
    """Names of the shipped runtime presets."""
    return sorted(path.stem for path in config_directory().glob("*.toml"))


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
