"""Compiling for GPUs that are not there: XLA, Mosaic GPU and ptxas take a description of one. Nothing is run."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from pallas_kernels.decode_attention import gpu as decode_attention
from pallas_kernels.matmul import gpu as matmul

# Compute capability, multiprocessors, bytes of shared memory for a block, of memory, a second, of second level cache.
_CHIPS = {
    "a100": (8, 108, 163 << 10, 80e9, 2.039e12, 40 << 20),
    "h100": (9, 132, 227 << 10, 80e9, 3.35e12, 50 << 20),
    "h200": (9, 132, 227 << 10, 141e9, 4.8e12, 50 << 20),
}


def describe(chip: str) -> str:
    """The properties by which XLA knows a GPU, as a `GpuTargetConfigProto` in text form."""
    major, multiprocessors, shared, memory, bandwidth, cache = _CHIPS[chip]
    features = "feature_extension: ACCELERATED_FEATURES" if major == 9 else ""
    version = '"13.0.0"'
    return f"""
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: 0 {features} }}
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared + 1024}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      core_count: {multiprocessors} fpus_per_core: {128 if major == 9 else 64} clock_rate_ghz: 1.4
      memory_bandwidth: {bandwidth:.0f} l2_cache_size: {cache}
      device_memory_size: {memory:.0f} device_address_bits: 64
      name: "NVIDIA {chip.upper()}"
      driver_version: {version} runtime_version: {version} compile_time_toolkit_version: {version} dnn_version: "9.10.0"
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "NVIDIA {chip.upper()}"
    """


@pytest.fixture(scope="session")
def compiler() -> None:
    """Skips where a GPU's compiler is incomplete."""
    try:
        mesh = Mesh(np.asarray(_devices("h200", 1)), "x")
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), np.float32, sharding=whole)).compile()
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        pytest.skip(f"no compiler for GPUs (the extra `aot`): {error}")


def _devices(chip: str, count: int) -> list:
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x1x{count}", target_config=describe(chip)
    ).devices


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch, unkept: None, compiler: None):
    """`with target("h200", data, model) as mesh:` what is traced within is what a host of these GPUs would trace."""

    @contextlib.contextmanager
    def host(chip: str, data: int = 1, model: int = 1) -> Iterator[Mesh]:
        devices = _devices(chip, data * model)
        mesh = Mesh(np.asarray(devices).reshape(data, model), ("data", "model"))
        with monkeypatch.context() as patch, jax.set_mesh(mesh):
            patch.setattr(jax, "default_backend", lambda: "gpu")
            patch.setattr(jax, "devices", lambda: devices)
            for kernel in (matmul, decode_attention):
                patch.setattr(kernel, "is_right", lambda: True)
            yield mesh

    return host
