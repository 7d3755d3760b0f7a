"""Product of activations with a weight that lies as [out, in]."""

from pallas_kernels.matmul.api import gated, gated_matmul, matmul

__all__ = ["gated", "gated_matmul", "matmul"]
