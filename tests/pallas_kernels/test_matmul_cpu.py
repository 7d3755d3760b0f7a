"""`matmul` on a CPU: the compiled kernels for every instruction set, and how they are built."""

import logging
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import dispatch
from pallas_kernels.cpu import library
from pallas_kernels.matmul import cpu, matmul

TYPES = ["bfloat16", "float16"]


def product(x, w):
    return jax.jit(lambda x, w: matmul(x, w, out_dtype=jnp.float32, implementation="cpu"))(x, w)


def draw(rows, out_features, in_features, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(rows, in_features)), rng.normal(size=(out_features, in_features))
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, dtype)


def check(y, x, w):
    expected = np.asarray(x.astype(w.dtype), np.float64) @ np.asarray(w, np.float64).T
    assert (y.shape, y.dtype) == (expected.shape, jnp.float32)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=3e-6 * np.sqrt(w.shape[1]))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("out_features", "in_features", "rows"),
    [
        (1, 1, (1, 4)),
        (7, 33, range(1, 17)),
        (130, 95, (1, 3, 8)),
        (6, 8193, (1, 5)),  # several parts of the columns, for any number of rows
        (530, 1100, (1, 2, 13, cpu.MAX_ROWS)),  # several chunks for the threads
    ],
)
def test_matches_numpy(out_features, in_features, rows, dtype, instruction_set):
    x, w = draw(max(rows), out_features, in_features, dtype)
    for m in rows:
        check(product(x[:m], w), x[:m], w)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_weight(dtype, instruction_set):
    """Infinities, nans and subnormals too, the last of bfloat16 perhaps as zeros."""
    w = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), jnp.dtype(dtype))
    y = product(jnp.ones((1, 1)), w[:, None])[0]
    exact = np.asarray(w).astype(np.float32)
    np.testing.assert_allclose(y, exact, rtol=0, atol=np.finfo(np.float32).tiny)


@pytest.mark.parametrize("dtype", TYPES)
def test_infinities_and_nans_stay_in_their_rows(dtype, instruction_set):
    x, w = draw(3, 9, 40, dtype)
    y = product(x.at[1, 39].set(jnp.inf).at[2, 0].set(jnp.nan), jnp.abs(w).at[4, 7].set(jnp.nan))
    expected = np.zeros((3, 9))
    expected[1], expected[2], expected[:, 4] = np.inf, np.nan, np.nan
    np.testing.assert_array_equal(np.where(np.isfinite(y), 0, y), expected)


def test_concurrent_calls(kernels):
    x, w = draw(64, 2000, 600, "bfloat16")
    run = jax.jit(lambda x, w: matmul(x, w, implementation="cpu"))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: np.asarray(run(x[i % 64][None], w)), range(400)))
    for i, y in enumerate(results):
        np.testing.assert_array_equal(y, results[i % 64])
    check(jnp.concatenate(results[:64]), x, w)


def test_under_vmap(kernels):
    x, w = draw(6, 5, 40, "bfloat16")
    y = jax.vmap(lambda x: matmul(x, w, implementation="cpu"))(x.reshape(3, 2, 40))
    check(y.reshape(6, 5), x, w)


def test_the_largest_weight_is_not_copied_out_of_a_loop(kernels):
    x = jax.ShapeDtypeStruct((1, 3072), jnp.float32)
    w = jax.ShapeDtypeStruct((200064, 3072), jnp.bfloat16)
    loop = jax.jit(lambda x, w: jax.lax.fori_loop(0, 4, lambda _, x: matmul(x, w, implementation="cpu")[:, :3072], x))
    assert loop.lower(x, w).compile().memory_analysis().temp_size_in_bytes < 4 << 20


def test_it_is_the_default(kernels):
    x, w = draw(1, 8, 8, "bfloat16")
    assert "phi4mm_matmul" in jax.jit(matmul).lower(x, w).as_text()


@pytest.mark.parametrize("axes", [("model", None), (None, "model")])
def test_a_sharded_weight_is_not_gathered_where_xla_is_preferred(axes):
    def traced(x, w):
        with dispatch.prefer("xla"):
            return matmul(x, w)

    mesh = Mesh(jax.devices()[:1] if jax.device_count() < 2 else jax.devices()[:2], "model")
    w = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
    x = jax.ShapeDtypeStruct((1, 512), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    compiled = jax.jit(traced).lower(x, w).compile()
    assert "phi4mm_matmul" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < w.size


def test_what_it_does_not_do(kernels, monkeypatch):
    x, w = draw(cpu.MAX_ROWS + 1, 4, 8, "bfloat16")
    with pytest.raises(NotImplementedError, match="bfloat16 or float16 weights, not float32"):
        product(x, w.astype(jnp.float32))
    with pytest.raises(NotImplementedError, match="at most 16 rows with a 16 bit weight, not 17"):
        product(x, w)
    with pytest.raises(NotImplementedError, match=r"not 2 and \(0, 8\)"):
        product(x[:2], w[:0])
    monkeypatch.setenv("PHI4MM_NATIVE", "0")
    with pytest.raises(NotImplementedError, match="no compiled kernels"):
        product(x[:2], w)
    assert "phi4mm_matmul" not in jax.jit(lambda *a: matmul(*a)).lower(x[:2], w).as_text()


def test_unknown_setting(monkeypatch):
    monkeypatch.setenv("PHI4MM_NATIVE", "sse")
    with pytest.raises(ValueError, match="PHI4MM_NATIVE=sse: 0, 1, portable, avx2, avx512, avx512_bf16 expected"):
        library.widest_instruction_set()


@pytest.fixture
def fresh(tmp_path, monkeypatch, caplog):
    """Registers as a new process would, with an empty cache; returns success and the lines of the log."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "pallas_kernels")

    def register():
        return library._register.__wrapped__(), [(r.levelname, r.getMessage()) for r in caplog.records]

    return register


@pytest.mark.parametrize("setting", [{"CXX": "/nonexistent/c++"}, {"CXX": "", "PATH": ""}])
def test_no_compiler(setting, fresh, monkeypatch):
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    registered, [(level, line)] = fresh()
    assert not registered
    assert level == "INFO" and "no C++ compiler" in line


def script(path, text):
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("exit 1", "exit status 1"),
        ('[ "$1" = --version ] || { echo in file; echo "no.h: error: absent"; exit 1; } >&2', "no.h: error: absent"),
        ('[ "$1" = --version ] && exit; for last; do :; done; echo text > "$last"', ".so"),  # not a library
    ],
)
def test_a_build_that_fails(compiler, reason, fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path / "c++", compiler))
    registered, lines = fresh()
    assert not registered
    [line] = [line for level, line in lines if level == "WARNING"]
    assert reason in line and "left to XLA" in line


def test_a_cache_that_others_can_write(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", script(tmp_path / "c++", "true"))
    (tmp_path / "cache/phi4mm_jax/kernels").mkdir(parents=True)
    (tmp_path / "cache/phi4mm_jax/kernels").chmod(0o777)
    registered, [(_, line)] = fresh()
    assert not registered
    assert "can be written by other users" in line


RUN = """
import jax.numpy as jnp
from pallas_kernels.cpu import library
from pallas_kernels.matmul import matmul
print(library.available(), matmul(jnp.ones((1, 40)), jnp.ones((3, 40), jnp.bfloat16)))
"""


def start(**environment):
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": "", **environment}
    return subprocess.Popen([sys.executable, "-c", RUN], env=environment, stdout=subprocess.PIPE, text=True)


def test_a_process_without_a_compiler(tmp_path):
    process = start(XDG_CACHE_HOME=str(tmp_path), PATH="", CXX="")
    assert process.communicate()[0] == "False [[40. 40. 40.]]\n"
    assert not list(tmp_path.iterdir())


def test_four_processes_build_at_once(kernels, tmp_path):
    """With a compiler that copies what was compiled before, slowly."""
    built = library._build(library._compiler())
    compiler = script(
        tmp_path / "c++",
        f"""
        [ "$1" = --version ] && exit
        echo x >> {tmp_path}/builds
        for last; do :; done
        head -c 100000 {built} > "$last"; sleep 1; cp {built} "$last"
        """,
    )
    cache = tmp_path / "cache"
    processes = [start(XDG_CACHE_HOME=str(cache), CXX=compiler) for _ in range(4)]
    assert [p.communicate()[0] for p in processes] == ["True [[40. 40. 40.]]\n"] * 4
    assert len((tmp_path / "builds").read_text()) > 2  # bytes: more than one build
    [made] = (cache / "phi4mm_jax/kernels").iterdir()
    assert made.read_bytes() == built.read_bytes()
    assert (cache / "phi4mm_jax/kernels").stat().st_mode & 0o777 == 0o700
