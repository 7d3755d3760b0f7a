import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from phi4mm_jax.weights.reader import CheckpointError, read_checkpoint, read_header


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(4, 3), "b": np.arange(3, dtype=np.float16)}
    save_file(arrays, path, metadata={"format": "pt"})
    return path


def test_reads_what_safetensors_wrote(file: Path) -> None:
    tensors = read_header(file)
    assert {name: (t.dtype, t.shape) for name, t in tensors.items()} == {
        "a": ("float32", (4, 3)),
        "b": ("float16", (3,)),
    }
    out = np.empty((2, 3), np.float32)
    tensors["a"].read_into(out, row=1)
    np.testing.assert_array_equal(out, [[3, 4, 5], [6, 7, 8]])


def test_shrunk_after_its_header_was_read(file: Path) -> None:
    tensor = read_header(file)["a"]
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="ends before byte"):
        tensor.read_into(np.empty((4, 3), np.float32))


def damaged(header: object) -> Callable[[bytes], bytes]:
    text = json.dumps(header).encode()
    return lambda _: len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"truncated: \d+ bytes, but its header describes"),
        (lambda data: data[:100], "truncated or no safetensors file"),
        (lambda data: b"", "truncated or no safetensors file"),
        (lambda data: data[:8] + b"x" + data[9:], "damaged header"),
        (lambda data: data[:20] + b"\xff" + data[21:], "damaged header"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (damaged([]), "damaged header"),
        (damaged({"a": {"dtype": "F32", "shape": [2]}}), "damaged header"),
        (damaged({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}), "damaged header"),
        (damaged({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}), "a has dtype F8_E4M3; expected"),
    ],
)
def test_damaged_files(file: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=f"model.safetensors: {message}"):
        read_checkpoint(file.parent)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        read_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"no \*.safetensors files"):
        read_checkpoint(tmp_path)


def test_all_bad_shards_are_named(file: Path) -> None:
    index = {"weight_map": {"a": file.name, "c": "second.safetensors", "d": "third.safetensors"}}
    (file.parent / "model.safetensors.index.json").write_text(json.dumps(index))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="3 problems") as error:
        read_checkpoint(file.parent)
    for problem in ("model.safetensors: truncated", "second.safetensors: cannot be read", "third.safetensors: cannot"):
        assert problem in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_damaged_index(file: Path, text: str) -> None:
    (file.parent / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="index.json: damaged"):
        read_checkpoint(file.parent)


def test_name_in_two_files(file: Path) -> None:
    save_file({"a": np.zeros(1, np.float32)}, file.parent / "other.safetensors")
    with pytest.raises(CheckpointError, match=re.escape("a is in both model.safetensors and other.safetensors")):
        read_checkpoint(file.parent)


def test_adapter_folders_fill_in_what_the_shards_lack(tmp_path: Path) -> None:
    value = {"m.lora_A.vision.weight": np.zeros((1, 2), np.float32)}
    save_file(value, tmp_path / "model.safetensors")
    for adapter in ("vision", "speech"):
        (tmp_path / f"{adapter}-lora").mkdir()
        arrays = {"base_model.model.m.lora_A.weight": np.ones((3, 2), np.float32)}
        save_file(arrays, tmp_path / f"{adapter}-lora" / "adapter_model.safetensors")
    shapes = {name: tensor.shape for name, tensor in read_checkpoint(tmp_path).items()}
    assert shapes == {"m.lora_A.vision.weight": (1, 2), "m.lora_A.speech.weight": (3, 2)}
