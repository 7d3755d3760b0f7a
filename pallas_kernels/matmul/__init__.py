"""Product of activations with a weight that lies as [out, in]."""

from pallas_kernels.matmul.api import matmul

__all__ = ["matmul"]
