"""The yardstick for CPU speed: the decoder's shapes in plain PyTorch bfloat16, with random weights.

    python benchmarks/torch_decode.py [--layers 32] [--context 512] [--prompt 256] [--repeat 5]

Prints wall and CPU seconds (user + system, all threads) per decoded token and per prefill. It needs PyTorch, which this
project does not depend on, and 8 GB of memory for all 32 layers. No adapters, no encoders, no sampling.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi4mm_jax.config import ModelConfig, TextConfig

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    raise SystemExit("this benchmark needs PyTorch: pip install torch") from None

RELEASED = Path(__file__).parents[1] / "configs" / "model" / "phi4mm.toml"


class Decoder:
    """Layers of random weights, each with a cache of `capacity` tokens, filled with noise."""

    def __init__(self, config: TextConfig, num_layers: int, capacity: int):
        """Allocates everything."""
        self.config = config
        width, heads, kv_heads, size = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim

        def weight(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[-1] ** -0.5)

        self.layers = [
            {
                "qkv": weight((heads + 2 * kv_heads) * size, width),
                "out": weight(width, heads * size),
                "gate_up": weight(2 * config.intermediate_size, width),
                "down": weight(width, config.intermediate_size),
                "norms": torch.ones(2, width, dtype=torch.bfloat16),
                "cache": weight(2, kv_heads, capacity, size),
            }
            for _ in range(num_layers)
        ]
        self.embedding = weight(config.vocab_size, width)
        frequencies = config.rope_theta ** -(torch.arange(0, config.rotary_dim, 2) / config.rotary_dim)
        angles = torch.outer(torch.arange(capacity), frequencies)
        self.cos, self.sin = (f(angles).to(torch.bfloat16).repeat(1, 2) for f in (torch.cos, torch.sin))

    @torch.inference_mode()
    def __call__(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Runs tokens [T] at positions `start` and on; returns the logits [V] of the last one."""
        x = F.embedding(tokens, self.embedding)
        for layer in self.layers:
            x = x + self._attention(layer, F.rms_norm(x, x.shape[-1:], layer["norms"][0]), start)
            h = F.rms_norm(x, x.shape[-1:], layer["norms"][1])
            gate, up = F.linear(h, layer["gate_up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return F.linear(x[-1:], self.embedding)[0]

    def _attention(self, layer: dict[str, torch.Tensor], x: torch.Tensor, start: int) -> torch.Tensor:
        config, end = self.config, start + len(x)
        heads = F.linear(x, layer["qkv"]).view(len(x), -1, config.head_dim).transpose(0, 1)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads])
        q, k = (self._rotate(h, start, end) for h in (q, k))
        layer["cache"][0, :, start:end], layer["cache"][1, :, start:end] = k, v
        keys, values = layer["cache"][:, :, :end]
        # A prefill starts an empty cache, so that its causal mask is the plain one.
        out = F.scaled_dot_product_attention(q[None], keys[None], values[None], is_causal=len(x) > 1, enable_gqa=True)
        return F.linear(out[0].transpose(0, 1).reshape(len(x), -1), layer["out"])

    def _rotate(self, h: torch.Tensor, start: int, end: int) -> torch.Tensor:
        rotated, rest = h[..., : self.config.rotary_dim], h[..., self.config.rotary_dim :]
        low, high = rotated.chunk(2, dim=-1)
        turned = rotated * self.cos[start:end] + torch.cat([-high, low], dim=-1) * self.sin[start:end]
        return torch.cat([turned, rest], dim=-1)


def measure(name: str, run: Callable[[], Any], repeat: int) -> None:
    """Prints the median cost of `repeat` calls, after one that is not counted."""
    run()
    walls, cpus = [], []
    for _ in range(repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    print(f"| {name} | {statistics.median(walls):.3f} | {statistics.median(cpus):.3f} |", flush=True)


def main() -> None:
    """Parses the arguments and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, metavar="N")
    parser.add_argument("--context", type=int, default=512, metavar="N", help="tokens in the cache when decoding")
    parser.add_argument("--prompt", type=int, default=256, metavar="N", help="tokens of the prefill")
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    args = parser.parse_args()
    config = ModelConfig.from_toml(RELEASED).text
    decoder = Decoder(config, args.layers, max(args.context + 1, args.prompt))
    tokens = torch.randint(config.vocab_size, (args.prompt,))
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {args.layers} layers\n")
    print("| PyTorch bfloat16 | wall s | CPU-s |\n|---|---|---|")
    measure(f"prefill of {args.prompt} tokens", lambda: decoder(tokens, 0), args.repeat)
    measure(f"one token after {args.context}", lambda: decoder(tokens[:1], args.context), args.repeat)


if __name__ == "__main__":
    main()
