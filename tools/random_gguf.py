"""Writes the decoder with random weights as GGUF: llama.cpp can then be measured on its shapes without a download.

    python -m tools.random_gguf OUT.gguf [--layers 32]

Weights are Q4_0, the embedding, which is the head too, Q6_K, as llama.cpp's own converter does it. There is no
tokenizer: tokens go in by number. It needs the `gguf` package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
from tqdm import tqdm

from phi4mm_jax.config import ModelConfig

_Q4, _Q6 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q6_K


def random_blocks(rng: np.random.Generator, shape: tuple[int, int], form: gguf.GGMLQuantizationType) -> np.ndarray:
    """A matrix of random quantized blocks: [rows, bytes of a row] uint8."""
    size, block_bytes = gguf.GGML_QUANT_SIZES[form]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // size, block_bytes), np.uint8)
    # Both kinds have one float16 scale, Q4_0 at the front and Q6_K, beside its small integer scales, at the end.
    scale = np.frombuffer(np.float16(shape[1] ** -0.5 / (4 if form == _Q4 else 500)).tobytes(), np.uint8)
    blocks[..., slice(2) if form == _Q4 else slice(-2, None)] = scale
    return blocks.reshape(shape[0], -1)


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, metavar="N", help="of the decoder; default: all")
    options = parser.parse_args()
    config = ModelConfig.load("phi4mm").text
    layers = options.layers or config.num_layers
    rng = np.random.default_rng(0)

    writer = gguf.GGUFWriter(options.out, "phi3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    def add(name: str, rows: int, columns: int, form: gguf.GGMLQuantizationType = _Q4) -> None:
        writer.add_tensor(f"{name}.weight", random_blocks(rng, (rows, columns), form), raw_dtype=form)

    def add_ones(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(config.hidden_size, np.float32))

    width = config.hidden_size
    add("token_embd", config.vocab_size, width, _Q6)
    add_ones("output_norm")
    for i in tqdm(range(layers), desc="Layers", disable=None):
        add_ones(f"blk.{i}.attn_norm")
        add(f"blk.{i}.attn_qkv", (config.num_heads + 2 * config.num_kv_heads) * config.head_dim, width)
        add(f"blk.{i}.attn_output", width, config.num_heads * config.head_dim)
        add_ones(f"blk.{i}.ffn_norm")
        add(f"blk.{i}.ffn_up", 2 * config.intermediate_size, width)
        add(f"blk.{i}.ffn_down", width, config.intermediate_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
