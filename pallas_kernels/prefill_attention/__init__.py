"""Causal attention of a chunk of a prompt over the cache that already holds it."""

from pallas_kernels.prefill_attention.api import prefill_attention

__all__ = ["prefill_attention"]
