"""The layering: imports run one way, only `runtime/steps.py` compiles, nothing configures JAX on import."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGES = {
    name: Path(importlib.util.find_spec(name).submodule_search_locations[0])
    for name in ("phi4mm_jax", "pallas_kernels")
}

_NUMERIC = {"numpy", "ml_dtypes"}

# Layer -> what it may import besides the standard library and itself. A layer is the longest prefix of a module's name.
RULES: dict[str, set[str]] = {
    "pallas_kernels": {"jax", "numpy"},
    "phi4mm_jax.config": set(),
    "phi4mm_jax.config.runtime": {"jax", "phi4mm_jax.config"},  # inside auto(), which asks for the devices
    "phi4mm_jax.processing": {
        *("av", "numpy", "PIL", "soundfile", "soxr", "tokenizers"),
        "phi4mm_jax.config",
    },
    "phi4mm_jax.models": {"jax", "flax", *_NUMERIC, "phi4mm_jax.config", "pallas_kernels"},
    "phi4mm_jax.weights": {
        *("jax", "flax", *_NUMERIC, "huggingface_hub", "orbax", "safetensors", "tqdm"),
        *("phi4mm_jax.config", "phi4mm_jax.models"),
    },
    "phi4mm_jax.runtime": {
        *("jax", "flax", *_NUMERIC),
        *("phi4mm_jax.config", "phi4mm_jax.models", "phi4mm_jax.weights", "pallas_kernels"),
        "phi4mm_jax.processing.prompt",  # the request's dataclasses
    },
    "phi4mm_jax.serving": {
        *("fastapi", "llguidance", "numpy", "prometheus_client", "pydantic", "starlette", "uvicorn"),
        *("phi4mm_jax.config", "phi4mm_jax.processing", "phi4mm_jax.runtime"),
        *("phi4mm_jax.answer", "phi4mm_jax.api", "phi4mm_jax.service"),
    },
    "phi4mm_jax.evaluation": {
        *("filelock", "fsspec", "grain", "huggingface_hub", "jax", "jinja2", "jiwer", "num2words", "numpy", "PIL"),
        *("pyarrow", "rapidfuzz", "rouge_score", "sacrebleu", "soundfile", "tqdm", "whisper_normalizer", "yaml"),
        *("phi4mm_jax.config", "phi4mm_jax.processing", "phi4mm_jax.runtime"),
        *("phi4mm_jax.answer", "phi4mm_jax.api", "phi4mm_jax.service"),
    },
    "phi4mm_jax.mistralrs": {
        *("phi4mm_jax.config", "phi4mm_jax.processing", "phi4mm_jax.runtime", "phi4mm_jax.weights"),
        *("phi4mm_jax.answer", "phi4mm_jax.api", "phi4mm_jax.service"),
        *("phi4mm_jax.serving.calls", "phi4mm_jax.serving.grammar", "phi4mm_jax.serving.tools"),  # without a server
    },
}

COMPILERS = {"jax.jit", "jax.pmap", "jax.experimental.pjit.pjit", "flax.nnx.jit", "flax.nnx.pmap", "equinox.filter_jit"}
CONFIGURING_CALLS = {"jax.config.update", "os.environ.setdefault", "os.environ.update", "os.putenv"}
CONFIGURED_OBJECTS = {"jax.config", "os.environ"}


def source_files() -> Iterator[tuple[str, Path]]:
    """Yields every module's dotted name and file."""
    for package, root in PACKAGES.items():
        for path in sorted(root.rglob("*.py")):
            parts = (package, *path.relative_to(root).with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(module: str, tree: ast.AST, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Yields line and absolute dotted name of everything imported anywhere in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            base += [node.module] if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)


def within(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def layer_of(module: str) -> str | None:
    return max((layer for layer in RULES if within(module, {layer})), key=len, default=None)


def forbidden_imports(module: str, tree: ast.AST, is_package: bool = False) -> list[str]:
    layer = layer_of(module)
    if layer is None:
        return []
    return [
        f"{module}:{line} imports {name}"
        for line, name in imports(module, tree, is_package)
        if name.split(".")[0] not in sys.stdlib_module_names and not within(name, RULES[layer] | {layer})
    ]


def resolver(tree: ast.AST) -> Callable[[ast.AST], str]:
    """Returns a function that spells an expression such as `jnp.dot` with the names' origins: `jax.numpy.dot`."""
    origins = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            origins |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            origins |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def resolve(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{resolve(node.value)}.{node.attr}"
        return origins.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    return resolve


def compilations(module: str, tree: ast.AST) -> list[str]:
    """Uses of jit and its kin, outside of the one module that may."""
    if module == "phi4mm_jax.runtime.steps":
        return []
    resolve = resolver(tree)
    return [
        f"{module}:{node.lineno} uses {resolve(node)}"
        for node in ast.walk(tree)
        if isinstance(node, (ast.Attribute, ast.Name)) and resolve(node) in COMPILERS
    ]


def _run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes that run when the module is imported: everything but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from _run_on_import(child)


def configurations(module: str, tree: ast.AST) -> list[str]:
    """Writes to JAX's configuration or the environment that happen on import."""
    resolve = resolver(tree)
    found = []
    for node in _run_on_import(tree):
        if isinstance(node, ast.Call) and resolve(node.func) in CONFIGURING_CALLS:
            found.append(f"{module}:{node.lineno} calls {resolve(node.func)}")
        for target in node.targets if isinstance(node, ast.Assign) else []:
            if isinstance(target, (ast.Attribute, ast.Subscript)) and resolve(target.value) in CONFIGURED_OBJECTS:
                found.append(f"{module}:{node.lineno} writes {resolve(target.value)}")
    return found


@pytest.mark.parametrize("check", [forbidden_imports, compilations, configurations])
def test_layering(check: Callable[..., list[str]]) -> None:
    found = []
    for module, path in source_files():
        extra = {"is_package": path.name == "__init__.py"} if check is forbidden_imports else {}
        found += check(module, ast.parse(path.read_text(), path), **extra)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("check", "module", "source"),
    [
        (forbidden_imports, "pallas_kernels.a", "from phi4mm_jax.config import ModelConfig"),
        (forbidden_imports, "pallas_kernels.a", "import flax"),
        (forbidden_imports, "phi4mm_jax.config", "from phi4mm_jax import models"),
        (forbidden_imports, "phi4mm_jax.config.model", "def f():\n    import jax"),
        (forbidden_imports, "phi4mm_jax.processing.a", "def f():\n    import jax.numpy as jnp"),
        (forbidden_imports, "phi4mm_jax.models.a", "from ..runtime import engine"),
        (forbidden_imports, "phi4mm_jax.models.a", "from phi4mm_jax.weights.mapping import RULES"),
        (forbidden_imports, "phi4mm_jax.weights.a", "from phi4mm_jax.runtime.mesh import Mesh"),
        (forbidden_imports, "phi4mm_jax.runtime.a", "from phi4mm_jax.processing.processor import Processor"),
        (forbidden_imports, "phi4mm_jax.runtime.a", "from phi4mm_jax import api"),
        (compilations, "phi4mm_jax.runtime.engine", "import jax\nf = jax.jit(abs)"),
        (compilations, "phi4mm_jax.models.a", "from jax import jit as j\n@j\ndef f(): pass"),
        (compilations, "phi4mm_jax.models.a", "from flax import nnx\n@nnx.jit\ndef f(): pass"),
        (configurations, "phi4mm_jax.a", "import jax\njax.config.update('jax_enable_x64', True)"),
        (configurations, "phi4mm_jax.a", "from jax import config\nif 1:\n    config.jax_enable_x64 = True"),
        (configurations, "phi4mm_jax.a", "import os\nos.environ['XLA_FLAGS'] = ''"),
        (configurations, "phi4mm_jax.a", "from os import environ as e\nclass A:\n    e.setdefault('XLA_FLAGS', '')"),
    ],
)
def test_each_rule_catches_its_violation(check: Callable[..., list[str]], module: str, source: str) -> None:
    assert check(module, ast.parse(source))


def test_permitted_code_passes() -> None:
    tree = ast.parse("import os\nimport jax\nfrom . import rope\ndef f():\n    os.environ['A'] = 'b'")
    for check in (forbidden_imports, compilations, configurations):
        assert not check("phi4mm_jax.models.text", tree)


@pytest.mark.parametrize("module", ["", ".config", ".cli", ".processing.processor"])
def test_import_leaves_jax_alone(module: str) -> None:
    code = f"import phi4mm_jax{module}, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code]).returncode == 0
