"""Bidirectional attention of an encoder."""

from pallas_kernels.encoder_attention.api import encoder_attention

__all__ = ["encoder_attention"]
