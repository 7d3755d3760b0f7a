"""A yardstick for CPU speed, for peers.py: the decoder's shapes in plain PyTorch bfloat16, with random weights.

It needs PyTorch, which this project does not depend on, and 8 GB of memory for all 32 layers. No adapters, no encoders,
no sampling.
"""

from __future__ import annotations

from phi4mm_jax.config import TextConfig

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    raise SystemExit("this benchmark needs PyTorch: pip install torch") from None


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
