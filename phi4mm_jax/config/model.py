"""What the model is: every dimension and constant of one checkpoint."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Self

from phi4mm_jax.config.building import Settings, wrong
from phi4mm_jax.config.checkpoint import build_from_checkpoint
from phi4mm_jax.config.files import build_from_toml, config_directory

_MAX_EOS_IDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(Settings):
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
        super().__post_init__()
        self._require_positive("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        self._require_positive("num_kv_heads", "rope_theta", "rms_norm_eps")
        self._require_multiple("hidden_size", "num_heads")
        self._require_multiple("num_heads", "num_kv_heads")
        self._require_multiple("intermediate_size", "num_kv_heads")
        if self.original_max_position_embeddings < 2:
            raise wrong("original_max_position_embeddings", self.original_max_position_embeddings, "must be at least 2")
        if self.max_position_embeddings < self.original_max_position_embeddings:
            least = f"must be at least original_max_position_embeddings {self.original_max_position_embeddings}"
            raise wrong("max_position_embeddings", self.max_position_embeddings, least)
        if not 2 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            share = f"expected a share of up to 1 that makes an even number of a head's {self.head_dim} dimensions"
            raise wrong("partial_rotary_factor", self.partial_rotary_factor, share)
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if len(factors) != self.rotary_dim // 2 or not all(factor > 0 for factor in factors):
                accepted = f"expected {self.rotary_dim // 2} positive numbers, got {len(factors)} values"
                raise wrong(name, factors, accepted)

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
class VisionConfig(Settings):
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
        super().__post_init__()
        self._require_positive("hidden_size", "intermediate_size", "num_layers", "num_heads", "image_size")
        self._require_positive("patch_size", "max_crops", "layer_norm_eps")
        self._require_multiple("hidden_size", "num_heads")
        self._require_multiple("image_size", "patch_size", factor=2)  # patches are pooled two by two
        if not 1 <= self.num_used_layers <= self.num_layers:
            raise wrong("feature_layer", self.feature_layer, f"expected the output of one of {self.num_layers} layers")

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
class AudioConfig(Settings):
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
        super().__post_init__()
        self._require_positive("hidden_size", "intermediate_size", "num_layers", "num_heads", "conv_channels")
        self._require_positive("bias_max_distance", "input_size", "kernel_size", "window", "layer_norm_eps")
        self._require_multiple("hidden_size", "num_heads")
        if self.time_reduction != 8:
            raise wrong("time_reduction", self.time_reduction, "only 8 is supported")

    @property
    def window_frames(self) -> int:
        """Log-mel frames of one attention window."""
        return self.window * self.time_reduction

    def num_tokens(self, num_frames: int) -> int:
        """Audio tokens of `num_frames` log-mel frames."""
        return -(-num_frames // self.time_reduction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Settings):
    """One low-rank adapter of the decoder (phi4mm-reference, section 3)."""

    rank: int
    """Rank r."""
    alpha: float
    """The adapter's output is multiplied by alpha / rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("rank", "alpha")

    @property
    def scale(self) -> float:
        """Factor on the adapter's output."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenConfig(Settings):
    """Token ids that the model itself gives a meaning (phi4mm-reference, section 6)."""

    image: int
    """Placeholder of one image token."""
    audio: int
    """Placeholder of one audio token."""
    pad: int
    """Padding."""
    eos: tuple[int, ...]
    """Ids that end a generation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.eos) <= _MAX_EOS_IDS:
            raise wrong("eos", self.eos, f"expected 1 to {_MAX_EOS_IDS} token ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, ids in dataclasses.asdict(self.tokens).items():
            for token in ids if isinstance(ids, tuple) else (ids,):
                if not 0 <= token < self.text.vocab_size:
                    raise wrong(f"tokens.{name}", token, f"expected an id below vocab_size {self.text.vocab_size}")

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Reads a shipped description by name (`"phi4mm"`), a `.toml` file, or a checkpoint directory.

        Raises:
          ConfigError: no such thing, or one of its settings is unknown, missing, wrong or not supported.
        """
        if str(source) in models():
            return cls.from_toml(config_directory() / "model" / f"{source}.toml")
        return cls.from_toml(source) if Path(source).suffix == ".toml" else cls.from_checkpoint(source)

    @classmethod
    def from_toml(cls, path: str | Path) -> Self:
        """Reads a model description such as `configs/model/phi4mm.toml`."""
        return build_from_toml(cls, Path(path))

    @classmethod
    def from_checkpoint(cls, directory: str | Path) -> Self:
        """Reads `config.json` and its companions in a checkpoint directory, in the hub's or transformers' layout.

        Raises:
          ConfigError: a file is missing or malformed, is of another model, or asks for what is not supported.
        """
        return build_from_checkpoint(cls, Path(directory))


def models() -> list[str]:
    """Names of the shipped model descriptions."""
    return sorted(path.stem for path in (config_directory() / "model").glob("*.toml"))
