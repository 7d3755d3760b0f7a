"""The trainer of phi4mm-nano: it runs the network that the runtime runs, and goes on after it was stopped."""

import json
from pathlib import Path
from random import Random
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from phi4mm_jax.api import Phi4MM
from phi4mm_jax.config import ModelConfig
from phi4mm_jax.models.audio import LEAD
from phi4mm_jax.weights.loader import load
from tools.checkpoint_files import write_checkpoint
from tools.nano import train
from tools.nano.batches import Run, Writer, image_arrays
from tools.nano.export import TrainedValues
from tools.nano.network import Network, initial_leaves

CONFIG = ModelConfig.load("nano")


def test_network_is_that_of_the_runtime(nano: Phi4MM, tmp_path: Path) -> None:
    """Logits of a row with a picture and speech, once by the trainer's forward pass, once by the model's prefill."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (60, 150, 3), np.uint8))
    clip = (rng.standard_normal(9000).astype(np.float32) * 0.1, 16_000)
    text = "<|user|><|image_1|><|audio_1|>Say it.<|end|><|assistant|>"
    prompt = nano.processor.raw(text, [picture], [clip])
    expected = nano.logits(text, images=[picture], audios=[clip])

    network = Network(CONFIG)
    names = list(nano.steps.abstract())
    leaves = dict(zip(names, (leaf for tower in nano.weights for leaf in tower), strict=True))
    run = Run("text", CONFIG, nano.processor.tokenizer, tmp_path, steps=1, seed=0)
    batch = Writer(run).batch([prompt.token_ids], len(prompt.token_ids), Random(0))
    audio, image = prompt.audios[0], prompt.images[0]
    features = np.zeros((1, LEAD + 8 * audio.num_tokens, 80), np.float32)
    features[0, LEAD : LEAD + len(audio.features)] = audio.features
    labels = [np.zeros((len(image.crops), 64), np.int32)]
    batch = batch._replace(
        use_long=np.array([False]),
        features=features,
        frames=np.array([len(audio.features)], np.int32),
        **image_arrays(CONFIG, batch.tokens, [[image]], labels, 5),
    )
    assert set(leaves) == set(network.shapes)
    logits = network.logits(leaves, jax.tree.map(jnp.asarray, batch), "vision")
    np.testing.assert_allclose(logits[0], expected, atol=2e-4)


def test_export_and_load_give_the_leaves_back(tmp_path: Path) -> None:
    leaves = {path: jnp.asarray(leaf, jnp.bfloat16) for path, leaf in initial_leaves(CONFIG, 1).items()}
    write_checkpoint(tmp_path / "nano", CONFIG, TrainedValues(leaves), unused=False)
    abstract = {p: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for p, shape in Network(CONFIG).shapes.items()}
    loaded, report = load(tmp_path / "nano", ModelConfig.from_checkpoint(tmp_path / "nano"), abstract, lambda _, x: x)
    assert not report.skipped
    for path, leaf in loaded.items():
        np.testing.assert_array_equal(leaf, leaves[path], err_msg=path)


@pytest.mark.filterwarnings("ignore")  # of the training libraries
def test_training_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_SECONDS_PER_CHECKPOINT", 0.0)

    class Interrupted(SimpleNamespace):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

        def update(self):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    def run(name: str) -> int:
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            return train.main([str(tmp_path / name), "--stage", "text", "--steps", "4"])

    with monkeypatch.context() as patch:
        patch.setattr(train, "_bar", lambda *_: Interrupted(left=3, disable=True))
        assert run("parts") == 130
    assert run("parts") == 0
    assert run("whole") == 0
    whole, parts = (train.stage_leaves(tmp_path / name, "text") for name in ("whole", "parts"))
    assert set(whole) == {path for path in Network(CONFIG).shapes if path.startswith("text.")}
    for path, leaf in whole.items():
        np.testing.assert_array_equal(leaf, parts[path], err_msg=path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "whole" / "text" / "log.jsonl").read_text().splitlines()]
    assert steps == [4]
    assert (tmp_path / "whole" / "text" / "loss.png").stat().st_size > 1000


def test_a_stage_needs_those_before_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([str(tmp_path), "--stage", "vision"]) == 1
    assert "stage text comes first" in capsys.readouterr().err


def test_every_leaf_is_trained_in_some_stage() -> None:
    untrained = [
        path for path in Network(CONFIG).shapes if not any(stage.trains(path) for stage in train.STAGES.values())
    ]
    assert untrained == ["audio.inv_std", "audio.mean"]  # measured, not trained
