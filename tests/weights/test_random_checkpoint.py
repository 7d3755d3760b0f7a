import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.weights.reader import CheckpointError, read_checkpoint
from tools.checkpoint_files import config_files, plan, shard_header, shard_index, write_json
from tools.random_checkpoint import RandomValues, main

LAYOUTS = ("hub", "native")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_released_index_and_shard_sizes(released: ModelConfig, shared: Path) -> None:
    files = plan(released, "hub")
    expected = (shared / "tokenizer" / "model.safetensors.index.json").read_text()
    assert json.dumps(shard_index(files), indent=2) + "\n" == expected
    sizes = []
    for tensors in files.values():
        by_name = {e.name: e for e in sorted(tensors, key=lambda e: e.name)}
        sizes.append(len(shard_header(by_name)) + sum(2 * int(np.prod(e.shape)) for e in tensors))
    assert sizes == [4_997_504_848, 4_952_333_128, 1_199_389_232]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_config_files_round_trip(released: ModelConfig, layout: str, tmp_path: Path) -> None:
    for name, value in config_files(released, layout).items():
        write_json(tmp_path / name, value)
    assert ModelConfig.from_checkpoint(tmp_path) == released
    assert "_tiny_overrides" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_checkpoint(write: Callable[..., Path], small: ModelConfig, layout: str) -> None:
    directory = write(layout=layout, shard_bytes=200_000)
    assert ModelConfig.from_checkpoint(directory) == small
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    for name, tensor in read_checkpoint(directory).items():
        value = np.empty(tensor.shape, tensor.dtype)
        tensor.read_into(value)
        assert np.isfinite(value.astype(np.float32)).all(), name
        assert np.abs(value.astype(np.float32)).max() < 10, name


def test_same_seed_same_bytes(write: Callable[..., Path]) -> None:
    first, second, other = (contents(write(f"c{i}", seed=seed)) for i, seed in enumerate((3, 3, 4)))
    assert first == second
    assert first.keys() == other.keys()
    assert first["model.safetensors"] != other["model.safetensors"]


def test_tokenizer_is_copied(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    assert (write(tokenizer=tmp_path / "tokenizer") / "tokenizer.json").read_text() == "{}"
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        write("second", tokenizer=tmp_path)


def test_existing_directory_is_kept(write: Callable[..., Path]) -> None:
    before = contents(write())
    with pytest.raises(CheckpointError, match="already exists"):
        write()
    assert main([str(write("other"))]) == 1
    assert contents(write("again")) == before


def test_interruption_leaves_nothing(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: object, entry: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RandomValues, "chunks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())
    assert main([str(tmp_path / "checkpoint")]) == 130
    assert not list(tmp_path.iterdir())
