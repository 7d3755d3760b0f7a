"""Writing checkpoints: the tensors under the names of a real one, cut into shards, and the configuration files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from phi4mm_jax.config import LoraConfig, ModelConfig
from phi4mm_jax.models.lora import ADAPTERS
from phi4mm_jax.weights.mapping import Entry, Layout, adapter_of, entries
from phi4mm_jax.weights.progress import track
from phi4mm_jax.weights.reader import ADAPTER_FILE, INDEX_NAME
from phi4mm_jax.weights.saved import new_directory

RELEASED = Path(__file__).parents[1] / "configs" / "model" / "phi4mm.toml"
SHARD_BYTES = 5_000_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
ITEM_BYTES = 2  # bfloat16


class Values(Protocol):
    """What the tensors of a checkpoint hold."""

    def chunks(self, entry: Entry) -> Iterable[bytes | memoryview]:
        """Yields a tensor's bfloat16 bytes, in as many parts as it likes."""
        ...


def _num_bytes(entry: Entry) -> int:
    return math.prod(entry.shape) * ITEM_BYTES


def plan(
    config: ModelConfig, layout: Layout, shard_bytes: int = SHARD_BYTES, unused: bool = True
) -> dict[str, list[Entry]]:
    """Returns file name to tensors: shards cut in the order of the state dict, and native adapter folders.

    Args:
      config: the model's sizes.
      layout: see `write_checkpoint`.
      shard_bytes: see `write_checkpoint`.
      unused: with the tensors that a released checkpoint holds but no model reads.
    """
    shards: list[list[Entry]] = [[]]
    adapters: dict[str, list[Entry]] = {}
    size = 0
    for entry in entries(config, layout):
        if entry.skipped and not unused:
            continue
        adapter = adapter_of(entry.name)
        if adapter and layout == "native":
            adapters.setdefault(f"{adapter}-lora/{ADAPTER_FILE}", []).append(entry)
            continue
        if size + _num_bytes(entry) > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += _num_bytes(entry)
    if len(shards) == 1:
        return {"model.safetensors": shards[0], **adapters}
    names = (f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1))
    return dict(zip(names, shards, strict=True)) | adapters


def _stored_name(entry: Entry, file: str) -> str:
    """The tensor's name in `file`: an adapter's own file leaves the adapter's name out."""
    return entry.name.replace(f".{adapter_of(entry.name)}.weight", ".weight") if ADAPTER_FILE in file else entry.name


def shard_header(tensors: dict[str, Entry]) -> bytes:
    """Returns the bytes that precede the data of a safetensors file; `tensors` are in the order of their data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in tensors.items():
        end = offset + _num_bytes(entry)
        header[name] = {"dtype": "BF16", "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_index(files: dict[str, list[Entry]]) -> dict[str, Any]:
    """Returns the content of `model.safetensors.index.json`."""
    shards = {name: tensors for name, tensors in files.items() if ADAPTER_FILE not in name}
    weight_map = {entry.name: name for name, tensors in shards.items() for entry in tensors}
    total = sum(map(_num_bytes, itertools.chain.from_iterable(shards.values())))
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, and its folder if that is missing."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_checkpoint(
    out: Path,
    config: ModelConfig,
    values: Values,
    *,
    layout: Layout = "hub",
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    unused: bool = True,
    progress: bool = False,
) -> None:
    """Writes a checkpoint to the new directory `out`; nothing is left there if it fails.

    Args:
      out: the directory, which must not exist or must be empty.
      config: the model's sizes.
      values: what the tensors hold.
      layout: names and files of the hub's main branch, or of transformers' port.
      tokenizer: directory with the tokenizer's files, which are copied.
      shard_bytes: most bytes of one shard.
      unused: see `plan`.
      progress: report it on standard error.

    Raises:
      CheckpointError: `out` holds something.
      FileNotFoundError: `tokenizer` has no `tokenizer.json`.
    """
    if tokenizer and not (tokenizer / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{tokenizer}: no tokenizer.json there")
    with new_directory(out) as partial:
        for name, value in config_files(config, layout).items():
            write_json(partial / name, value)
        for name in TOKENIZER_FILES if tokenizer else ():
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, partial / name)
        _write_weights(partial, plan(config, layout, shard_bytes, unused), values, progress)


def _write_weights(directory: Path, files: dict[str, list[Entry]], values: Values, progress: bool) -> None:
    if "model.safetensors" not in files:
        write_json(directory / INDEX_NAME, shard_index(files))
    everything = list(itertools.chain.from_iterable(files.values()))

    def written() -> Iterator[Entry]:
        for name, unsorted in files.items():
            tensors = {_stored_name(e, name): e for e in sorted(unsorted, key=lambda e: e.name)}
            with (directory / name).open("wb") as file:
                file.write(shard_header(tensors))
                for entry in tensors.values():
                    file.writelines(values.chunks(entry))
                    yield entry

    work = {"action": "Writing", "of": "tensors", "count": len(everything), "total": sum(map(_num_bytes, everything))}
    for _ in track(written(), _num_bytes, **work, show=progress):
        pass


# --- configuration files: the inverse of ModelConfig.from_checkpoint -----------------------------------------


def config_files(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Returns file name to JSON value of the configuration: the inverse of `ModelConfig.from_checkpoint`."""
    files = {
        "config.json": _hub_config(config) if layout == "hub" else _native_config(config),
        "generation_config.json": {
            "bos_token_id": config.tokens.pad,
            "eos_token_id": list(config.tokens.eos),
            "pad_token_id": config.tokens.pad,
        },
        "preprocessor_config.json": {
            "image_processor_type": "Phi4MMImageProcessor",
            "feature_extractor_type": "Phi4MMAudioFeatureExtractor",
            "audio_compression_rate": config.audio.time_reduction,
            "audio_downsample_rate": 1,
            "audio_feat_stride": 1,
            "dynamic_hd": config.vision.max_crops,
        },
    }
    if layout == "native":
        for adapter in ADAPTERS:
            lora: LoraConfig = getattr(config, f"{adapter}_lora")
            files[f"{adapter}-lora/adapter_config.json"] = {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "bias": "none",
                "r": lora.rank,
                "lora_alpha": lora.alpha,
                "target_modules": r"model.layers.\d+.((self_attn.(qkv|o)_proj)|(mlp.(gate_up|down)_proj))",
            }
    return files


def _shared_config(config: ModelConfig) -> dict[str, Any]:
    """The decoder's keys, alike in both layouts."""
    text = config.text
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "max_position_embeddings": text.max_position_embeddings,
        "original_max_position_embeddings": text.original_max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": config.tokens.pad,
        "pad_token_id": config.tokens.pad,
    }


def _siglip_config(config: ModelConfig) -> dict[str, Any]:
    vision = config.vision
    return {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "feature_layer": vision.feature_layer,
        "layer_norm_eps": vision.layer_norm_eps,
    }


def _hub_config(config: ModelConfig) -> dict[str, Any]:
    text, audio = config.text, config.audio
    released = ModelConfig.from_toml(RELEASED)
    constants = {
        "image_token_id": config.tokens.image,
        "audio_token_id": config.tokens.audio,
        "end_token_id": config.tokens.eos[0],
        "vision": _siglip_config(config),
    }
    # The original has these in its code: a file says them only where they differ.
    as_released = dataclasses.replace(released.vision, max_crops=config.vision.max_crops) == config.vision
    overrides = {} if as_released and config.tokens == released.tokens else {"_tiny_overrides": constants}
    return {
        **overrides,
        "model_type": "phi4mm",
        "architectures": ["Phi4MMForCausalLM"],
        **_shared_config(config),
        "eos_token_id": config.tokens.pad,
        "rope_theta": text.rope_theta,
        "partial_rotary_factor": text.partial_rotary_factor,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": list(text.short_factor),
            "long_factor": list(text.long_factor),
        },
        "embd_layer": {
            "embedding_cls": "image_audio",
            "image_embd_layer": {"crop_size": config.vision.image_size, "hd_transform_order": "sub_glb"},
            "audio_embd_layer": {"compression_rate": audio.time_reduction},
        },
        "audio_processor": {
            "name": "cascades",
            "config": {
                "input_size": audio.input_size,
                "attention_dim": audio.hidden_size,
                "attention_heads": audio.num_heads,
                "linear_units": audio.intermediate_size,
                "num_blocks": audio.num_layers,
                "kernel_size": audio.kernel_size,
                "time_reduction": audio.time_reduction,
                "nemo_conv_settings": {"conv_channels": audio.conv_channels},
                "relative_attention_bias_args": {"type": "t5", "t5_bias_max_distance": audio.bias_max_distance},
            },
        },
        "vision_lora": {"r": config.vision_lora.rank, "lora_alpha": config.vision_lora.alpha},
        "speech_lora": {"r": config.speech_lora.rank, "lora_alpha": config.speech_lora.alpha},
    }


def _native_config(config: ModelConfig) -> dict[str, Any]:
    text, audio = config.text, config.audio
    return {
        "model_type": "phi4_multimodal",
        "architectures": ["Phi4MultimodalForCausalLM"],
        **_shared_config(config),
        "eos_token_id": list(config.tokens.eos),
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": text.rope_theta,
            "partial_rotary_factor": text.partial_rotary_factor,
            "original_max_position_embeddings": text.original_max_position_embeddings,
            "short_factor": list(text.short_factor),
            "long_factor": list(text.long_factor),
        },
        "vision_config": {
            "model_type": "phi4_multimodal_vision",
            **_siglip_config(config),
            "crop_size": config.vision.image_size,
            "image_token_id": config.tokens.image,
        },
        "audio_config": {
            "model_type": "phi4_multimodal_audio",
            "input_size": audio.input_size,
            "hidden_size": audio.hidden_size,
            "intermediate_size": audio.intermediate_size,
            "num_blocks": audio.num_layers,
            "num_attention_heads": audio.num_heads,
            "kernel_size": audio.kernel_size,
            "time_reduction": audio.time_reduction,
            "nemo_conv_channels": audio.conv_channels,
            "bias_max_distance": audio.bias_max_distance,
            "audio_token_id": config.tokens.audio,
        },
    }
