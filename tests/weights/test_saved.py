"""Saved models: what is restored is what was saved, to the bit, and nothing damaged or unfinished is loaded."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from phi4mm_jax import Phi4MM, cli
from phi4mm_jax.config import ConfigError
from phi4mm_jax.weights.reader import CheckpointError
from phi4mm_jax.weights.saved import MANIFEST, Manifest, new_directory

IDS = np.arange(20) + 300
GROUPS = {"group_size": 32}
FORMATS = [(None, {}), ("int8", {}), ("w8a8", {}), ("fp8", {}), ("int4", {}), ("int4", {"zero_point": True})]


def load(source: str | Path = "nano", quantize: str | None = None, **sections: dict) -> Phi4MM:
    return Phi4MM.from_pretrained(source, quantize=quantize, progress=False, **sections)


@pytest.fixture(scope="module", params=["orbax", "safetensors"])
def storage(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def original(storage: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model; tests that damage it take a copy."""
    path = tmp_path_factory.mktemp("models") / "int4"
    load(quantize="int4", quantization=GROUPS).save_pretrained(path, storage=storage)
    return path


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.mark.parametrize(("form", "settings"), FORMATS, ids=str)
def test_what_is_restored_is_what_was_saved(storage: str, form: str | None, settings: dict, tmp_path: Path) -> None:
    model = load(quantize=form, quantization=settings)
    model.save_pretrained(tmp_path / "saved", storage=storage)
    again = load(tmp_path / "saved")
    before, after = jax.tree.flatten(model.weights), jax.tree.flatten(again.weights)
    assert before[1] == after[1]
    for a, b in zip(before[0], after[0], strict=True):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(model.logits(IDS), again.logits(IDS))


def test_restores_to_other_shardings_and_types(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI4MM_NATIVE", "0")  # one device would round activations
    exact = {"params": "float32", "kv_cache": "float32"}  # a bfloat16 cache rounds two nearly equal keys apart
    alone = load(original, dtypes=exact)
    assert alone.steps.unpack(alone.weights)["text.norm.weight"].dtype == jnp.float32
    together = load(original, dtypes=exact, mesh={"model": 2})
    leaf = together.steps.unpack(together.weights)["text.layers.0.mlp.down.weight"]
    assert leaf.values.dtype == jnp.int4 and len(leaf.values.sharding.device_set) == 2
    np.testing.assert_allclose(together.logits(IDS), alone.logits(IDS), atol=1e-4)


def test_the_manifest_says_what_it_is(original: Path) -> None:
    manifest = Manifest.read(original)
    assert (manifest.source, manifest.revision) == ("nano", None)
    assert (manifest.quantization.decoder, manifest.quantization.group_size) == ("int4", 32)
    assert manifest.arrays["text.layers.0.mlp.down.weight.values"] == ("uint8", (192, 512 // 2))
    files = {str(file.relative_to(original)) for file in original.rglob("*") if file.is_file()}
    assert files == {*manifest.files, MANIFEST}


def test_the_first_of_two_small_values_is_in_the_lower_half(tmp_path: Path) -> None:
    model = load(quantize="int4")
    model.save_pretrained(tmp_path / "saved", storage="safetensors")
    name = "text.layers.0.mlp.down.weight"
    stored = load_file(next((tmp_path / "saved").glob("*.safetensors")))[f"{name}.values"].astype(np.int32)
    values = np.asarray(model.steps.unpack(model.weights)[name].values).astype(np.int32)
    np.testing.assert_array_equal(stored & 15, values[:, ::2] & 15)
    np.testing.assert_array_equal(stored >> 4, values[:, 1::2] & 15)


def test_the_revision_of_a_snapshot_is_kept(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abcd"
    model = load()
    shutil.copytree(model.directory, snapshot)
    load(snapshot).save_pretrained(tmp_path / "saved")
    assert Manifest.read(tmp_path / "saved").revision == "0123abcd"


# --- damage --------------------------------------------------------------------------------------------------


def largest_file(path: Path) -> Path:
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_a_changed_byte_is_found(path: Path) -> None:
    file = largest_file(path)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"damaged file {file.relative_to(path)}"):
        load(path)


def test_a_file_cut_short_is_found(path: Path) -> None:
    file = largest_file(path)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"damaged file {file.relative_to(path)}"):
        load(path)


def test_a_missing_file_is_found(path: Path) -> None:
    file = largest_file(path)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"missing file {file.relative_to(path)}"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "has format_version 2; this package reads 1"),
        ({"quantization": {"decoder": "int3"}}, "damaged .*decoder = 'int3'"),
        ({"files": None}, "damaged"),
        ({"files": {"config.json": [1]}}, "damaged"),
        ({"storage": "zip"}, "damaged .*storage = 'zip': expected one of orbax, safetensors"),
        ({"arrays": {}}, "missing: audio"),
    ],
)
def test_a_wrong_manifest_is_refused(path: Path, change: dict, message: str) -> None:
    file = path / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_manifest_cut_short_is_refused(path: Path) -> None:
    file = path / MANIFEST
    file.write_text(file.read_text()[:-20])
    with pytest.raises(CheckpointError, match="damaged"):
        load(path)


KILLED = """
import os, signal, sys
from pathlib import Path
from phi4mm_jax import Phi4MM
from phi4mm_jax.weights.saved import Manifest
Manifest.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Phi4MM.from_pretrained("nano", quantize="int8", progress=False).save_pretrained(sys.argv[1])
"""


def test_a_killed_save_leaves_nothing_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "saved"
    assert subprocess.run([sys.executable, "-c", KILLED, out], check=False).returncode == -signal.SIGKILL
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved.partial"]
    with pytest.raises(ValueError, match=r"no such (file or )?directory"):
        load(out)
    with pytest.raises(CheckpointError, match="safetensors"):
        load(tmp_path / "saved.partial")
    load(quantize="int8").save_pretrained(out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def test_an_interrupted_save_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "saved") as partial:
        (partial / "file").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# --- what can't be asked -------------------------------------------------------------------------------------


def test_it_cannot_be_quantized_otherwise(original: Path) -> None:
    with pytest.raises(ConfigError, match=r"was saved as .*int4.*to quantize it anew load nano"):
        load(original, quantize="int8")
    load(original, quantize="int4", quantization=GROUPS)  # what it is


def test_an_existing_directory_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cli, "_load", None)
    assert cli.main(["quantize", "nano", str(tmp_path)]) == 2
    assert "already exists; name a new directory" in capsys.readouterr().err


def test_the_command_saves(tmp_path: Path) -> None:
    out = tmp_path / "saved"
    assert cli.main(["quantize", "nano", str(out), "--quantize", "w8a8", "--storage", "safetensors", "--quiet"]) == 0
    assert Manifest.read(out).quantization.decoder == "w8a8"
