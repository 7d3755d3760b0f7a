import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.weights.mapping import adapter_of, canonical_name, entries

BUFFERS = 160  # audio mean and inverse deviation: stored, but no parameters


@pytest.mark.parametrize("layout", ["hub", "native"])
def test_released_counts(released: ModelConfig, layout: str) -> None:
    tensors = list(entries(released, layout))
    assert len(tensors) == len({e.name for e in tensors}) == 2047
    assert sum(math.prod(e.shape) for e in tensors) == 5_574_460_224 + BUFFERS


@pytest.mark.parametrize(("layout", "count"), [("hub", 2047), ("native", 1535)])
def test_names_and_shapes_are_the_released_ones(released: ModelConfig, shared: Path, layout: str, count: int) -> None:
    lines = (shared / "docs" / f"tensors_{layout}.tsv").read_text().splitlines()
    expected = {name: tuple(map(int, shape.split("x"))) for name, shape in map(str.split, lines)}
    assert len(expected) == count
    has_adapters = layout == "hub"  # the native ones lie in files of their own
    assert {e.name: e.shape for e in entries(released, layout) if has_adapters or not adapter_of(e.name)} == expected


def test_every_leaf_is_filled_once(released: ModelConfig, small: ModelConfig, abstract_leaves: Callable) -> None:
    for config in (released, small):
        filled = [(e.path, e.leaf_shape) for e in entries(config, "hub") if e.path]
        assert sorted(filled) == sorted((p, leaf.shape) for p, leaf in abstract_leaves(config).items())


def test_skipped_tensors_have_a_reason(released: ModelConfig) -> None:
    skipped = [e for e in entries(released, "hub") if not e.path]
    assert all(e.skipped for e in skipped)
    assert sum(math.prod(e.shape) for e in skipped) == 30_480_160
    assert sorted(Counter(e.skipped for e in skipped).values()) == [2, 11, 16]


def test_regrouped_rows(small: ModelConfig) -> None:
    """As a reshape of every part to [group, row] and a concatenation per group."""
    fused = {e.path: e for e in entries(small, "hub") if e.parts}
    assert {p.split(".", 3)[3] for p in fused} == {
        f"{projection}.{factor}"
        for projection in ("attention.qkv", "mlp.gate_up")
        for factor in ("weight", "vision_b", "speech_b")
    }
    for entry in fused.values():
        rows = np.arange(entry.shape[0])
        regrouped = np.full_like(rows, -1)
        for source, target in entry.row_moves():
            regrouped[target] = rows[source]
        parts = np.split(rows, np.cumsum(entry.parts)[:-1])
        expected = np.concatenate([part.reshape(small.text.num_kv_heads, -1) for part in parts], axis=1)
        np.testing.assert_array_equal(regrouped, expected.reshape(-1))


def test_regrouped_projections_by_hand(released: ModelConfig) -> None:
    moves = {e.path: list(e.row_moves()) for e in entries(released, "hub") if e.path}
    qkv, gate_up = moves["text.layers.0.attention.qkv.weight"], moves["text.layers.0.mlp.gate_up.weight"]
    assert qkv[3:6] == [  # the second block: query heads 3 to 5, key head 1, value head 1
        (slice(384, 768), slice(640, 1024)),
        (slice(3072 + 128, 3072 + 256), slice(1024, 1152)),
        (slice(4096 + 128, 4096 + 256), slice(1152, 1280)),
    ]
    assert gate_up[1] == (slice(8192, 9216), slice(1024, 2048))
    assert moves["text.layers.0.attention.out.weight"] == [(slice(0, 3072), slice(0, 3072))]


@pytest.mark.parametrize(
    ("stored", "adapter", "expected"),
    [
        ("model.norm.weight", "", "model.norm.weight"),
        ("model.layers.0.mlp.down_proj.lora_A.weight", "vision", "model.layers.0.mlp.down_proj.lora_A.vision.weight"),
        ("base_model.model.model.layers.0.x.lora_B.weight", "speech", "model.layers.0.x.lora_B.speech.weight"),
        ("base_model.model.model.layers.0.x.lora_B.default.weight", "speech", "model.layers.0.x.lora_B.speech.weight"),
        ("model.layers.0.x.lora_B.speech.weight", "speech", "model.layers.0.x.lora_B.speech.weight"),
        ("a.encoders.1._checkpoint_wrapped_module.conv.glu.b1", "", "a.encoders.1.conv.glu.b1"),
    ],
)
def test_canonical_name(stored: str, adapter: str, expected: str) -> None:
    assert canonical_name(stored, adapter) == expected
    assert adapter_of(expected) == adapter
