"""The one table of what every checkpoint tensor is called, how it is shaped, and which leaf it fills.

Two layouts exist (phi4mm-reference, section 7): "hub", the main branch of microsoft/Phi-4-multimodal-instruct, and
"native", that of transformers' own port. A `Rule` names a tensor in both; `entries` binds the table to a model's sizes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Literal

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.models.lora import ADAPTERS

Layout = Literal["hub", "native"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One tensor of the checkpoint, or one per layer where the names hold `{i}`."""

    hub: str
    """Name in the hub's layout."""
    native: str
    """Name in transformers' layout; adapters, which lie in files of their own there, keep the hub's name."""
    axes: str
    """Sizes of the tensor, then of the leaf where they differ: "C 1 3 3 -> C 3 3", in the names of `_axes`."""
    path: str
    """Leaf of the model, or "" for a tensor that the model does not have."""
    regroup: str = ""
    """Sizes of the fused parts along the rows, to be cut into one group per key/value head."""
    adapter: str = ""
    """Adapter whose alpha / rank is multiplied into the tensor."""
    skipped: str = ""
    """Why a tensor without a leaf is not needed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A rule bound to a model's sizes and one layer: a single tensor and a single leaf."""

    name: str
    """Canonical name of the tensor (see `canonical_name`)."""
    shape: tuple[int, ...]
    """Shape in the checkpoint."""
    path: str
    """Leaf of the model, or "" if skipped."""
    leaf_shape: tuple[int, ...]
    """Shape in the model."""
    parts: tuple[int, ...] = ()
    """Rows of each fused part, if the rows are regrouped."""
    groups: int = 1
    """Groups that they are cut into."""
    scale: float = 1.0
    """Factor on every value."""
    skipped: str = ""
    """Why the tensor has no leaf."""

    def row_moves(self) -> Iterator[tuple[slice, slice]]:
        """Yields which rows (of the first axis) of the tensor become which rows of the leaf.

        Fused rows are regrouped: block k of the leaf holds the k-th share of every part, so that tensor parallelism
        cuts between blocks and leaves every device whole heads.
        """
        if not self.parts:
            yield slice(0, self.shape[0]), slice(0, self.shape[0])
            return
        shares = [part // self.groups for part in self.parts]
        target = 0
        for group in range(self.groups):
            start = 0
            for part, share in zip(self.parts, shares, strict=True):
                source = start + group * share
                yield slice(source, source + share), slice(target, target + share)
                start, target = start + part, target + share


# --- the table -----------------------------------------------------------------------------------------------

_IMAGE = "model.embed_tokens_extend.image_embed."
_SIGLIP = _IMAGE + "img_processor."
_AUDIO = "model.embed_tokens_extend.audio_embed."
_HEAD = "SigLIP's pooling head is not used; the features come from a hidden state"


def _one(hub: str, axes: str, path: str = "", *, native: str = "", **extra: str) -> Rule:
    """A tensor, of the same name in both layouts unless told."""
    return Rule(hub=hub, native=native or hub, axes=axes, path=path, **extra)


def _affine(hub: str, axes: str, path: str = "", *, native: str = "", skipped: str = "") -> tuple[Rule, ...]:
    """`.weight` with `axes`, and `.bias` with their first; `path` is the prefix of both leaves."""

    def rule(kind: str, axes: str) -> Rule:
        leaf = f"{path}.{kind}" if path else ""
        return _one(f"{hub}.{kind}", axes, leaf, native=native and f"{native}.{kind}", skipped=skipped)

    return rule("weight", axes), rule("bias", axes.split()[0])


def _adapted(hub: str, out: str, width: str, path: str, regroup: str = "") -> tuple[Rule, ...]:
    """A decoder projection [out, width] with its two adapters."""
    hub, path = f"model.layers.{{i}}.{hub}", f"text.layers.{{i}}.{path}"
    ranks = {"vision": "Rv", "speech": "Rs"}
    return (
        _one(f"{hub}.base_layer.weight", f"{out} {width}", f"{path}.weight", native=f"{hub}.weight", regroup=regroup),
        *(_one(f"{hub}.lora_A.{a}.weight", f"{r} {width}", f"{path}.{a}_a") for a, r in ranks.items()),
        *(
            _one(f"{hub}.lora_B.{a}.weight", f"{out} {r}", f"{path}.{a}_b", regroup=regroup, adapter=a)
            for a, r in ranks.items()
        ),
    )


def _speech_feed_forward(name: str, path: str) -> tuple[Rule, ...]:
    hub, path = f"{_AUDIO}encoder.encoders.{{i}}.{name}", f"audio.layers.{{i}}.{path}"
    return (
        *_affine(f"{hub}.layer_norm", "Da", f"{path}.norm"),
        *_affine(f"{hub}.net.0.linear", "2*Fa Da", f"{path}.up_gate", native=f"{hub}.gate_up_proj"),
        *_affine(f"{hub}.net.2", "Da Fa", f"{path}.down", native=f"{hub}.down_proj"),
    )


def _speech_block() -> tuple[Rule, ...]:
    hub, path = _AUDIO + "encoder.encoders.{i}.", "audio.layers.{i}."
    return (
        *_speech_feed_forward("feed_forward_in", "ff_in"),
        *_affine(hub + "layer_norm_att", "Da", path + "attention_norm"),
        *itertools.chain.from_iterable(
            _affine(
                f"{hub}self_attn.linear_{name}",
                "Da Da",
                f"{path}attention.{name}",
                native=f"{hub}self_attn.{'o' if name == 'out' else name}_proj",
            )
            for name in ("q", "k", "v", "out")
        ),
        *_affine(hub + "conv.layer_norm", "Da", path + "conv.norm"),
        *_affine(hub + "conv.glu.ext_pw_conv_1d", "2*Da Da 1 -> 2*Da Da", path + "conv.glu"),
        _one(hub + "conv.glu.b1", "1 Da 1 -> Da", path + "conv.value_bias"),
        _one(hub + "conv.glu.b2", "1 Da 1 -> Da", path + "conv.gate_bias"),
        *_affine(hub + "conv.dw_sep_conv_1d.dw_conv", "Da 1 taps -> Da taps", path + "conv.depthwise"),
        *_affine(hub + "conv.dw_sep_conv_1d.pw_conv", "Da Da 1 -> Da Da", path + "conv.pointwise_in"),
        *_affine(hub + "conv.ext_pw_conv_1d", "Da Da 1 -> Da Da", path + "conv.pointwise_out"),
        *_speech_feed_forward("feed_forward_out", "ff_out"),
        *_affine(hub + "layer_norm", "Da", path + "norm"),
    )


def _siglip_block() -> tuple[Rule, ...]:
    hub, path = _SIGLIP + "encoder.layers.{i}.", "vision.layers.{i}."
    return (
        *_affine(hub + "layer_norm1", "Dv", path + "norm1"),
        *itertools.chain.from_iterable(
            _affine(f"{hub}self_attn.{name}_proj", "Dv Dv", f"{path}attention.{name}")
            for name in ("q", "k", "v", "out")
        ),
        *_affine(hub + "layer_norm2", "Dv", path + "norm2"),
        *_affine(hub + "mlp.fc1", "Fv Dv", path + "mlp.up"),
        *_affine(hub + "mlp.fc2", "Dv Fv", path + "mlp.down"),
    )


# In the order of the original's state dict, which decides where the released checkpoint is cut into shards.
RULES: tuple[Rule, ...] = (
    _one("model.embed_tokens.weight", "V D", "text.embed.weight"),
    # images
    _one(_IMAGE + "glb_GN", "1 1 Dv -> Dv", "vision.view_separator", native=_IMAGE + "global_img_feature_extensor"),
    _one(_IMAGE + "sub_GN", "1 1 1 Dv -> Dv", "vision.row_separator", native=_IMAGE + "sub_img_feature_extensor"),
    *_affine(_SIGLIP + "embeddings.patch_embedding", "Dv 3 p p -> Dv 3*p*p", "vision.patch_embedding"),
    _one(_SIGLIP + "embeddings.position_embedding.weight", "P*P Dv", "vision.position_embedding"),
    *_siglip_block(),
    *_affine(_SIGLIP + "post_layernorm", "Dv", skipped="the feature layer lies before SigLIP's last norm"),
    _one(_SIGLIP + "head.probe", "1 1 Dv", skipped=_HEAD),
    _one(_SIGLIP + "head.attention.in_proj_weight", "3*Dv Dv", skipped=_HEAD),
    _one(_SIGLIP + "head.attention.in_proj_bias", "3*Dv", skipped=_HEAD),
    *_affine(_SIGLIP + "head.attention.out_proj", "Dv Dv", skipped=_HEAD),
    *_affine(_SIGLIP + "head.layernorm", "Dv", skipped=_HEAD),
    *_affine(_SIGLIP + "head.mlp.fc1", "Fv Dv", skipped=_HEAD),
    *_affine(_SIGLIP + "head.mlp.fc2", "Dv Fv", skipped=_HEAD),
    *_affine(_IMAGE + "img_projection.0", "D Dv", "vision.projector.up", native=_IMAGE + "img_projection_up"),
    *_affine(_IMAGE + "img_projection.2", "D D", "vision.projector.down", native=_IMAGE + "img_projection_down"),
    # speech
    _one(_AUDIO + "encoder.encoder_embedding.global_mean", "mel", "audio.mean"),
    _one(_AUDIO + "encoder.encoder_embedding.global_invstd", "mel", "audio.inv_std"),
    *_affine(_AUDIO + "encoder.embed.conv.0", "C 1 3 3 -> C 3 3", "audio.subsampling.conv"),
    *_affine(_AUDIO + "encoder.embed.conv.2", "C 1 3 3 -> C 3 3", "audio.subsampling.depthwise1"),
    *_affine(_AUDIO + "encoder.embed.conv.3", "C C 1 1 -> C C", "audio.subsampling.pointwise1"),
    *_affine(_AUDIO + "encoder.embed.conv.5", "C 1 3 3 -> C 3 3", "audio.subsampling.depthwise2"),
    *_affine(_AUDIO + "encoder.embed.conv.6", "C C 1 1 -> C C", "audio.subsampling.pointwise2"),
    *_affine(_AUDIO + "encoder.embed.out", "Da C*mel8", "audio.subsampling.out"),
    _one(_AUDIO + "encoder.relative_attention_bias_layer.bias_values.weight", "2*L Na", "audio.relative_bias"),
    *_speech_block(),
    *itertools.chain.from_iterable(
        (
            *_affine(
                f"{_AUDIO}audio_projection.{mode}.0",
                "D Da",
                f"audio.{mode}_projector.up",
                native=f"{_AUDIO}up_proj_for_{native}",
            ),
            *_affine(
                f"{_AUDIO}audio_projection.{mode}.2",
                "D D",
                f"audio.{mode}_projector.down",
                native=f"{_AUDIO}down_proj_for_{native}",
            ),
        )
        for mode, native in (("speech", "speech"), ("vision", "vision_speech"))
    ),
    # the decoder
    *_adapted("self_attn.o_proj", "D", "N*H", "attention.out"),
    *_adapted("self_attn.qkv_proj", "QKV", "D", "attention.qkv", regroup="N*H K*H K*H"),
    *_adapted("mlp.gate_up_proj", "2*F", "D", "mlp.gate_up", regroup="F F"),
    *_adapted("mlp.down_proj", "D", "F", "mlp.down"),
    _one("model.layers.{i}.input_layernorm.weight", "D", "text.layers.{i}.input_norm.weight"),
    _one("model.layers.{i}.post_attention_layernorm.weight", "D", "text.layers.{i}.post_attention_norm.weight"),
    _one("model.norm.weight", "D", "text.norm.weight"),
)

# Not in the released checkpoint, but some tools write it.
TIED_HEAD = _one("lm_head.weight", "V D", skipped="the output head is tied to the embedding")


# --- the table, bound to a model -----------------------------------------------------------------------------


def _axes(config: ModelConfig) -> dict[str, int]:
    """Sizes by the names that the table uses."""
    text, vision, audio = config.text, config.vision, config.audio
    return {
        "V": text.vocab_size,
        "D": text.hidden_size,
        "F": text.intermediate_size,
        "N": text.num_heads,
        "K": text.num_kv_heads,
        "H": text.head_dim,
        "QKV": (text.num_heads + 2 * text.num_kv_heads) * text.head_dim,
        "Rv": config.vision_lora.rank,
        "Rs": config.speech_lora.rank,
        "Dv": vision.hidden_size,
        "Fv": vision.intermediate_size,
        "P": vision.patches_per_side,
        "p": vision.patch_size,
        "Da": audio.hidden_size,
        "Fa": audio.intermediate_size,
        "Na": audio.num_heads,
        "C": audio.conv_channels,
        "L": audio.bias_max_distance,
        "taps": audio.kernel_size,
        "mel": audio.input_size,
        "mel8": -(-audio.input_size // audio.time_reduction),
    }


def entries(config: ModelConfig, layout: Layout, rules: tuple[Rule, ...] = RULES) -> Iterator[Entry]:
    """Yields every tensor that a checkpoint of this model has, in the order of the original's state dict.

    Args:
      config: the model's sizes.
      layout: whose names; both are canonical (see `canonical_name`).
      rules: the table.
    """
    axes = _axes(config)

    def sizes(names: str) -> tuple[int, ...]:
        return tuple(math.prod(axes[f] if f in axes else int(f) for f in name.split("*")) for name in names.split())

    def bind(rule: Rule, layer: int) -> Entry:
        stored, _, leaf = rule.axes.partition(" -> ")
        path, skipped = rule.path.format(i=layer), rule.skipped
        if rule.path.startswith("vision.layers.") and layer >= config.vision.num_used_layers:
            path, skipped = "", "a SigLIP layer after the feature layer"
        return Entry(
            name=getattr(rule, layout).format(i=layer),
            shape=sizes(stored),
            path=path,
            leaf_shape=sizes(leaf or stored),
            parts=sizes(rule.regroup),
            groups=config.text.num_kv_heads,
            scale=getattr(config, f"{rule.adapter}_lora").scale if rule.adapter else 1.0,
            skipped=skipped,
        )

    def stack(rule: Rule) -> str:
        return rule.path.partition(".")[0] if "{i}" in rule.hub else ""

    for name, group in itertools.groupby(rules, stack):
        layers = getattr(config, name).num_layers if name else 1
        yield from (bind(rule, i) for i, rule in itertools.product(range(layers), tuple(group)))


# --- names ---------------------------------------------------------------------------------------------------

_ADAPTER_FACTOR = re.compile(r"\.lora_([AB])(?:\.(?:vision|speech|default))?\.weight$")


def adapter_of(name: str) -> str:
    """Returns the adapter that a canonical name belongs to, or ""."""
    return next((a for a in ADAPTERS if name.endswith((f".lora_A.{a}.weight", f".lora_B.{a}.weight"))), "")


def canonical_name(name: str, adapter: str = "") -> str:
    """Returns a stored tensor's name as the table has it.

    Args:
      name: the name in a file; the prefixes of PEFT and of activation checkpointing are dropped.
      adapter: the adapter whose own file this is. There the factors are called `lora_A.weight`, with or without the
        adapter's name.
    """
    name = name.removeprefix("base_model.model.").replace("_checkpoint_wrapped_module.", "")
    return _ADAPTER_FACTOR.sub(rf".lora_\1.{adapter}.weight", name) if adapter else name
