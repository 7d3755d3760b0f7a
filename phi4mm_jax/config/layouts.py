"""What the two layouts of a checkpoint's JSON files call things: the hub's, and that of transformers' port.

A *reference* names a value in the files: `key.key` lies in config.json, `file#key.key` in another file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

GENERATION = "generation_config.json"
PREPROCESSOR = "preprocessor_config.json"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the settings of `ModelConfig` are, and what else the files must say."""

    sources: Mapping[str, str]
    """Setting -> its reference, or several in order of precedence with ` | ` between them."""
    constants: Mapping[str, Any]
    """Reference -> the only value that is implemented."""
    equals: Mapping[str, str]
    """Reference -> the reference whose value it must repeat."""


def _within(table: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{table}.{key}": value for key, value in values.items()}


def _vision_sources(table: str) -> dict[str, str]:
    return {
        "vision.hidden_size": f"{table}.hidden_size",
        "vision.intermediate_size": f"{table}.intermediate_size",
        "vision.num_layers": f"{table}.num_hidden_layers",
        "vision.num_heads": f"{table}.num_attention_heads",
        "vision.patch_size": f"{table}.patch_size",
        "vision.feature_layer": f"{table}.feature_layer",
        "vision.layer_norm_eps": f"{table}.layer_norm_eps",
    }


_TEXT_SOURCES = {
    "text.vocab_size": "vocab_size",
    "text.hidden_size": "hidden_size",
    "text.intermediate_size": "intermediate_size",
    "text.num_layers": "num_hidden_layers",
    "text.num_heads": "num_attention_heads",
    "text.num_kv_heads": "num_key_value_heads",
    "text.max_position_embeddings": "max_position_embeddings",
    "text.original_max_position_embeddings": "original_max_position_embeddings",
    "text.rms_norm_eps": "rms_norm_eps",
    "tokens.pad": "pad_token_id",
    "tokens.eos": f"{GENERATION}#eos_token_id | eos_token_id",
}
_CONSTANTS = {
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "lm_head_bias": False,
    "rope_scaling.type": "longrope",
    "rope_scaling.rope_type": "longrope",
    f"{PREPROCESSOR}#audio_compression_rate": 8,
    f"{PREPROCESSOR}#audio_downsample_rate": 1,
    f"{PREPROCESSOR}#audio_feat_stride": 1,
}
_CONFORMER_CONSTANTS = {
    "activation": "swish",
    "conv_activation": "swish",
    "conv_glu_type": "swish",
    "depthwise_multiplier": 1,
    "chunk_size": -1,
}
_VISION_CONSTANTS = {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3}


# --- the hub's main branch: model_type phi4mm ----------------------------------------------------------------

# Small checkpoints say here what the original has in its code.
OVERRIDES = "_tiny_overrides"
_IMAGE, _SPEECH, _CONFORMER = "embd_layer.image_embd_layer", "embd_layer.audio_embd_layer", "audio_processor.config"

HUB = Layout(
    sources={
        **_TEXT_SOURCES,
        "text.short_factor": "rope_scaling.short_factor",
        "text.long_factor": "rope_scaling.long_factor",
        "text.rope_theta": "rope_theta",
        "text.partial_rotary_factor": "partial_rotary_factor",
        **_vision_sources(f"{OVERRIDES}.vision"),
        "vision.image_size": f"{_IMAGE}.crop_size",
        "vision.max_crops": f"{OVERRIDES}.dynamic_hd | {PREPROCESSOR}#dynamic_hd",
        "audio.hidden_size": f"{_CONFORMER}.attention_dim",
        "audio.intermediate_size": f"{_CONFORMER}.linear_units",
        "audio.num_layers": f"{_CONFORMER}.num_blocks",
        "audio.num_heads": f"{_CONFORMER}.attention_heads",
        "audio.conv_channels": f"{_CONFORMER}.nemo_conv_settings.conv_channels",
        "audio.bias_max_distance": f"{_CONFORMER}.relative_attention_bias_args.t5_bias_max_distance",
        "audio.input_size": f"{_CONFORMER}.input_size",
        "audio.kernel_size": f"{_CONFORMER}.kernel_size",
        "audio.time_reduction": f"{_CONFORMER}.time_reduction",
        "vision_lora.rank": "vision_lora.r",
        "vision_lora.alpha": "vision_lora.lora_alpha",
        "speech_lora.rank": "speech_lora.r",
        "speech_lora.alpha": "speech_lora.lora_alpha",
        "tokens.image": f"{OVERRIDES}.image_token_id",
        "tokens.audio": f"{OVERRIDES}.audio_token_id",
    },
    constants={
        **_CONSTANTS,
        "embd_layer.embedding_cls": "image_audio",
        **_within(
            _IMAGE,
            {
                "embedding_cls": "tune_image",
                "hd_transform_order": "sub_glb",
                "image_token_compression_cls": "avg_pool_2d",
                "projection_cls": "mlp",
                "use_hd_transform": True,
                "with_learnable_separator": True,
            },
        ),
        **_within(
            _SPEECH,
            {
                "embedding_cls": "audio",
                "compression_rate": 8,
                "downsample_rate": 1,
                "projection_cls": "mlp",
                "use_conv_downsample": False,
                "use_qformer": False,
            },
        ),
        **_within(f"{OVERRIDES}.vision", _VISION_CONSTANTS),
        "audio_processor.name": "cascades",
        **_within(
            _CONFORMER,
            {
                **_CONFORMER_CONSTANTS,
                "causal": True,
                "bias_in_glu": True,
                "batch_norm": False,
                "ext_pw_kernel_size": 1,
                "input_layer": "nemo_conv",
                "relative_attention_bias_args.type": "t5",
                "relative_attention_bias_args.t5_bias_symmetric": False,
            },
        ),
    },
    equals={
        f"{OVERRIDES}.vision.image_size": f"{_IMAGE}.crop_size",
        f"{_CONFORMER}.encoder_embedding_config.input_size": f"{_CONFORMER}.input_size",
        f"{_CONFORMER}.ext_pw_out_channel": f"{_CONFORMER}.attention_dim",
        f"{_CONFORMER}.depthwise_seperable_out_channel": f"{_CONFORMER}.attention_dim",
    },
)


# --- transformers' port: model_type phi4_multimodal ----------------------------------------------------------

_VISION, _AUDIO = "vision_config", "audio_config"
_VISION_ADAPTER, _SPEECH_ADAPTER = (f"{name}-lora/adapter_config.json" for name in ("vision", "speech"))
_ADAPTER_CONSTANTS = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def _rope(key: str) -> str:
    """References of a rotary setting, which moved from one release of transformers to the next."""
    return f"rope_parameters.{key} | rope_scaling.{key} | {key}"


NATIVE = Layout(
    sources={
        **_TEXT_SOURCES,
        "text.short_factor": _rope("short_factor"),
        "text.long_factor": _rope("long_factor"),
        "text.rope_theta": _rope("rope_theta"),
        "text.partial_rotary_factor": _rope("partial_rotary_factor"),
        **_vision_sources(_VISION),
        "vision.image_size": f"{_VISION}.image_size | {_VISION}.crop_size",
        "vision.max_crops": f"{PREPROCESSOR}#dynamic_hd",
        "audio.hidden_size": f"{_AUDIO}.hidden_size",
        "audio.intermediate_size": f"{_AUDIO}.intermediate_size",
        "audio.num_layers": f"{_AUDIO}.num_blocks",
        "audio.num_heads": f"{_AUDIO}.num_attention_heads",
        "audio.conv_channels": f"{_AUDIO}.nemo_conv_channels",
        "audio.bias_max_distance": f"{_AUDIO}.bias_max_distance",
        "audio.input_size": f"{_AUDIO}.input_size",
        "audio.kernel_size": f"{_AUDIO}.kernel_size",
        "audio.time_reduction": f"{_AUDIO}.time_reduction",
        "vision_lora.rank": f"{_VISION_ADAPTER}#r",
        "vision_lora.alpha": f"{_VISION_ADAPTER}#lora_alpha",
        "speech_lora.rank": f"{_SPEECH_ADAPTER}#r",
        "speech_lora.alpha": f"{_SPEECH_ADAPTER}#lora_alpha",
        "tokens.image": f"{_VISION}.image_token_id",
        "tokens.audio": f"{_AUDIO}.audio_token_id",
    },
    constants={
        **_CONSTANTS,
        "rope_parameters.rope_type": "longrope",
        "rope_parameters.type": "longrope",
        **_within(_VISION, _VISION_CONSTANTS),
        **_within(_AUDIO, {**_CONFORMER_CONSTANTS, "nemo_activation": "relu", "bias_symmetric": False}),
        f"{_AUDIO}.downsample_rate": 1,
        **{f"{file}#{k}": v for file in (_VISION_ADAPTER, _SPEECH_ADAPTER) for k, v in _ADAPTER_CONSTANTS.items()},
    },
    equals={
        "rope_parameters.original_max_position_embeddings": "original_max_position_embeddings",
        f"{_VISION}.crop_size": f"{_VISION}.image_size",
        f"{_AUDIO}.ext_pw_out_channel": f"{_AUDIO}.hidden_size",
        f"{_AUDIO}.depthwise_separable_out_channel": f"{_AUDIO}.hidden_size",
    },
)

LAYOUTS = {"phi4mm": HUB, "phi4_multimodal": NATIVE}
