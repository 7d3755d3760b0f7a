import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.weights.loader import LoadReport, load
from phi4mm_jax.weights.reader import CheckpointError
from tools.checkpoint_files import write_checkpoint
from tools.random_checkpoint import RandomValues

Leaves = dict[str, np.ndarray]


@pytest.fixture
def load_leaves(abstract_leaves: Callable) -> Callable[..., tuple[Leaves, LoadReport]]:
    """Loads a directory into NumPy arrays."""

    def load_leaves(directory: Path, config: ModelConfig | None = None, dtype: Any = jnp.bfloat16):
        config = config or ModelConfig.from_checkpoint(directory)
        abstract = abstract_leaves(config, dtype)
        leaves, report = load(directory, config, abstract, lambda path, value: value, progress=False)
        assert {p: (v.shape, v.dtype) for p, v in leaves.items()} == {
            p: (a.shape, a.dtype) for p, a in abstract.items()
        }
        return leaves, report

    return load_leaves


def assert_same(first: Leaves, second: Leaves) -> None:
    assert first.keys() == second.keys()
    for path, value in first.items():
        np.testing.assert_array_equal(value, second[path], err_msg=path)


def edit(file: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_layouts_load_alike(write: Callable[..., Path], load_leaves: Callable) -> None:
    hub, report = load_leaves(write("hub", shard_bytes=500_000))
    native, native_report = load_leaves(write("native", layout="native"))
    assert_same(hub, native)
    assert report.num_tensors == native_report.num_tensors == len(hub)
    assert report.num_bytes == sum(2 * v.size for v in hub.values())
    assert len(report.skipped) == len(native_report.skipped) == 13 + 16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_oracle_layouts_load_alike(oracle: Path, load_leaves: Callable, dtype: Any) -> None:
    hub, _ = load_leaves(oracle / "ckpt_hub", dtype=dtype)
    native, _ = load_leaves(oracle / "ckpt_native", dtype=dtype)
    assert_same(hub, native)


def test_values(write: Callable[..., Path], small: ModelConfig, load_leaves: Callable) -> None:
    directory = write()
    tensors, (leaves, _) = load_file(directory / "model.safetensors"), load_leaves(directory)
    layer, mlp = "model.layers.1.", "model.layers.1.mlp.gate_up_proj."
    np.testing.assert_array_equal(leaves["text.embed.weight"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        leaves["text.layers.1.mlp.down.vision_a"], tensors[layer + "mlp.down_proj.lora_A.vision.weight"]
    )

    def regrouped(fused: np.ndarray) -> np.ndarray:
        gate, up = fused.reshape(2, small.text.num_kv_heads, -1, fused.shape[-1])
        return np.concatenate([gate, up], axis=1).reshape(fused.shape)

    np.testing.assert_array_equal(
        leaves["text.layers.1.mlp.gate_up.weight"], regrouped(tensors[mlp + "base_layer.weight"])
    )
    scaled = 3 * tensors[mlp + "lora_B.speech.weight"].astype(np.float32)
    np.testing.assert_array_equal(
        leaves["text.layers.1.mlp.gate_up.speech_b"], regrouped(scaled).astype(ml_dtypes.bfloat16)
    )
    patches = tensors["model.embed_tokens_extend.image_embed.img_processor.embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(leaves["vision.patch_embedding.weight"], patches.reshape(48, -1))


def test_converts_in_blocks(write: Callable[..., Path], load_leaves: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write()
    whole, _ = load_leaves(directory, dtype=jnp.float32)
    monkeypatch.setattr("phi4mm_jax.weights.loader._SCRATCH_BYTES", 1000)
    blocks, _ = load_leaves(directory, dtype=jnp.float32)
    assert_same(whole, blocks)


def test_all_misfits_are_named_at_once(
    write: Callable[..., Path], small: ModelConfig, abstract_leaves: Callable
) -> None:
    directory = write()

    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.o_proj.lora_B.speech.weight"]
        tensors["model.layers.0.input_layernorm.weight"] = np.zeros(7, np.float32)
        tensors["model.layers.2.input_layernorm.weight"] = np.zeros(144, np.float32)
        tensors["stray"] = np.zeros((2, 3), np.float32)

    edit(directory / "model.safetensors", change)
    abstract = abstract_leaves(small) | {"text.extra": jax.ShapeDtypeStruct((1,), jnp.float32)}
    abstract["audio.mean"] = jax.ShapeDtypeStruct((81,), jnp.float32)
    del abstract["audio.inv_std"]

    def place(path: str, value: np.ndarray) -> None:
        pytest.fail("a tensor was read")

    with pytest.raises(CheckpointError) as error:
        load(directory, small, abstract, place)
    audio = "model.embed_tokens_extend.audio_embed.encoder.encoder_embedding."
    assert str(error.value).splitlines() == [
        f"{directory}: 8 problems:",
        "  mis-shaped: model.layers.0.input_layernorm.weight is [7], expected [144]",
        "  missing: (no tensor in the table) for text.extra",
        "  missing: model.layers.1.self_attn.o_proj.lora_B.speech.weight for text.layers.1.attention.out.speech_b",
        "  missing: model.norm.weight for text.norm.weight",
        f"  no leaf audio.inv_std [80] in the model for {audio}global_invstd",
        f"  no leaf audio.mean [80] in the model for {audio}global_mean",
        "  unknown: model.layers.2.input_layernorm.weight [144]",
        "  unknown: stray [2, 3]",
    ]


def test_tied_head_is_skipped(write: Callable[..., Path], load_leaves: Callable) -> None:
    directory = write()
    edit(directory / "model.safetensors", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    _, report = load_leaves(directory)
    assert report.skipped["lm_head.weight"] == "the output head is tied to the embedding"


def test_unused_tensors_may_be_absent(write: Callable[..., Path], load_leaves: Callable) -> None:
    directory = write()
    complete, report = load_leaves(directory)
    edit(directory / "model.safetensors", lambda t: [t.pop(name) for name in report.skipped])
    stripped, report = load_leaves(directory)
    assert_same(complete, stripped)
    assert not report.skipped


@pytest.mark.parametrize(
    "rename",
    [
        lambda name, adapter: f"base_model.model.{name}",
        lambda name, adapter: name.replace(".weight", f".{adapter}.weight"),
        lambda name, adapter: "base_model.model." + name.replace(".weight", ".default.weight"),
    ],
)
def test_adapter_file_names(
    write: Callable[..., Path], load_leaves: Callable, rename: Callable[[str, str], str]
) -> None:
    directory = write(layout="native")
    expected, _ = load_leaves(directory)
    for adapter in ("vision", "speech"):
        file = directory / f"{adapter}-lora" / "adapter_model.safetensors"
        save_file({rename(name, adapter): value for name, value in load_file(file).items()}, file)
    assert_same(load_leaves(directory)[0], expected)


def test_adapter_folders_beside_shards_with_adapters(write: Callable[..., Path], load_leaves: Callable) -> None:
    hub, native = write("hub"), write("native", layout="native", seed=1)
    expected, _ = load_leaves(hub)
    for adapter in ("vision", "speech"):
        shutil.copytree(native / f"{adapter}-lora", hub / f"{adapter}-lora")
    assert_same(load_leaves(hub)[0], expected)


def test_missing_adapter_folder(write: Callable[..., Path], small: ModelConfig, load_leaves: Callable) -> None:
    directory = write(layout="native")
    shutil.rmtree(directory / "speech-lora")
    with pytest.raises(CheckpointError, match="16 problems") as error:
        load_leaves(directory, small)
    assert re.findall(r"missing: \S+lora_A\.(\w+)", str(error.value)) == ["speech"] * 8


def test_layer_missing_in_the_config(write: Callable[..., Path], load_leaves: Callable, small: ModelConfig) -> None:
    """A config.json of another model is not loaded in part."""
    directory = write()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"unknown: model\.layers\.1\.input_layernorm\.weight"):
        load_leaves(directory)


def test_progress_lines(write: Callable[..., Path], small: ModelConfig, abstract_leaves: Callable, capsys: Any) -> None:
    load(write(), small, abstract_leaves(small), lambda path, value: None)
    assert re.fullmatch(r"Loading weights: (\d+) of \1 tensors, 0\.0 of 0\.0 GB\n", capsys.readouterr().err)


def test_an_error_while_placing_ends_the_load(
    write: Callable[..., Path], small: ModelConfig, abstract_leaves: Callable
) -> None:
    def place(path: str, value: np.ndarray) -> None:
        raise MemoryError("device full")

    with pytest.raises(MemoryError, match="device full"):
        load(write(), small, abstract_leaves(small), place, progress=False)


PEAK = """
import sys
import jax
import numpy as np
from phi4mm_jax.config import ModelConfig
from phi4mm_jax.weights.loader import load
from phi4mm_jax.weights.mapping import entries

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

config = ModelConfig.from_checkpoint(sys.argv[1])
dtype = jax.numpy.dtype(sys.argv[2])
abstract = {e.path: jax.ShapeDtypeStruct(e.leaf_shape, dtype) for e in entries(config, "hub") if e.path}
jax.device_put(np.zeros(1)).block_until_ready()
before = peak()
leaves, _ = load(sys.argv[1], config, abstract, lambda path, value: jax.device_put(value), progress=False)
jax.block_until_ready(leaves)
print(peak() - before, sum(leaf.nbytes for leaf in leaves.values()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory(small: ModelConfig, tmp_path: Path, dtype: str) -> None:
    """Peak host memory is what is placed, and little more: no second copy, not even of the largest tensor."""
    text = {"vocab_size": 20_000, "hidden_size": 1152, "intermediate_size": 3072, "num_layers": 6, "num_heads": 48}
    factors = {"short_factor": (1.0,) * 9, "long_factor": (1.0,) * 9}
    config = dataclasses.replace(small, text=dataclasses.replace(small.text, **text, **factors))
    write_checkpoint(tmp_path / "checkpoint", config, RandomValues(0))
    arguments = [sys.executable, "-c", PEAK, str(tmp_path / "checkpoint"), dtype]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True)
    growth, placed = map(int, result.stdout.split())
    assert placed > 150e6
    assert growth < placed + 40e6, f"{growth / 1e6:.0f} MB for {placed / 1e6:.0f} MB"
