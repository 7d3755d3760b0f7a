"""The compiled kernels: built on first use by the system's C++ compiler, kept for later processes, never required."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

_LOG = logging.getLogger(__name__)
_HERE = Path(__file__).parent
_SOURCES = sorted(_HERE.glob("*.cc"))
_INCLUDED = sorted((*_HERE.glob("*.h"), *_HERE.glob("*.inc")))
_TARGETS = {
    "phi4mm_matmul": "Phi4mmMatmul",
    "phi4mm_quantized_matmul": "Phi4mmQuantizedMatmul",
    "phi4mm_decode_attention": "Phi4mmDecodeAttention",
    "phi4mm_prefill_attention": "Phi4mmPrefillAttention",
}
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-pthread", "-w")
_BUILD_SECONDS = 300
_LOCK = threading.Lock()

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16")
"""What the kernels are compiled for, from the narrowest to the widest."""


def widest_instruction_set() -> int | None:
    """Returns the index of the widest instruction set to use, if the machine has it, or None: no kernels at all.

    The environment variable PHI4MM_NATIVE may be 0 (no kernels), 1 (the default) or the name of a set.

    Raises:
      ValueError: it is something else.
    """
    name = os.environ.get("PHI4MM_NATIVE", "1")
    if name in ("0", "1"):
        return len(INSTRUCTION_SETS) - 1 if name == "1" else None
    if name not in INSTRUCTION_SETS:
        raise ValueError(f"PHI4MM_NATIVE={name}: 0, 1, {', '.join(INSTRUCTION_SETS)} expected")
    return INSTRUCTION_SETS.index(name)


def available() -> bool:
    """Whether the kernels are registered with JAX; tries to build and load them once in a process."""
    with _LOCK:
        return _register()


@functools.cache
def _register() -> bool:
    try:
        compiler = _compiler()
        if compiler is None:
            _LOG.info("no C++ compiler: products on the CPU are left to XLA, which decodes more slowly")
            return False
        library = ctypes.CDLL(str(_build(compiler)))
        for target, symbol in _TARGETS.items():
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    except (OSError, AttributeError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        _LOG.warning("products on the CPU are left to XLA, which decodes more slowly: %s", _reason(error))
        return False
    return True


def _reason(error: Exception) -> str:
    """One line: what the compiler calls an error, or what Python says."""
    stderr = getattr(error, "stderr", None)
    lines = stderr.splitlines() if isinstance(stderr, str) else []
    return next((line for line in lines if "error" in line), str(error))


def _compiler() -> list[str] | None:
    """The command of $CXX, if that is set, or of the system's compiler."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [[name] for name in _COMPILERS]:
        if program := shutil.which(command[0]):
            return [program, *command[1:]]
    return None


def _build(compiler: list[str]) -> Path:
    """Returns the library, compiled unless it was before from the same sources in the same way."""
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, timeout=_BUILD_SECONDS)
    command = [*compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}"]
    version = run([*compiler, "--version"]).stdout
    key = hashlib.sha256(repr((command, version, jax.lib.__version__, platform.machine())).encode())
    for source in (*_SOURCES, *_INCLUDED):
        key.update(source.read_bytes())
    cache = _cache_directory()
    library = cache / f"{key.hexdigest()[:32]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            objects = [str(Path(scratch, f"{source.stem}.o")) for source in _SOURCES]
            commands = [[*command, "-c", str(source), "-o", to] for source, to in zip(_SOURCES, objects, strict=True)]
            with ThreadPoolExecutor() as threads:  # one takes longer than the others together
                list(threads.map(run, commands))
            # It gets its name when it is whole: another process may be building the same.
            built = Path(scratch, library.name)
            run([*command, "-shared", *objects, "-o", str(built)])
            built.rename(library)
        _LOG.info("compiled the CPU kernels: %s", library)
    return library


def _cache_directory() -> Path:
    """A directory that only this user can write: what lies in it is executed."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi4mm_jax" / "kernels"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{path} can be written by other users")
    return path
