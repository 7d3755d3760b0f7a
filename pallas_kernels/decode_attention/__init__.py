"""Attention of one new token of each row over the cache."""

from pallas_kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
