"""The trainer of phi4mm-nano: it runs the network that the runtime runs, and goes on after it was stopped."""

import dataclasses
import json
import sys
from pathlib import Path
from random import Random

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from phi4mm_jax.api import Phi4MM
from phi4mm_jax.config import ModelConfig
from phi4mm_jax.models.audio import LEAD
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.weights.hub import BUNDLED
from phi4mm_jax.weights.loader import load
from tools.checkpoint_files import write_checkpoint
from tools.nano import batches, progress, schedule, train, vocabulary
from tools.nano.batches import Run, Writer, image_arrays
from tools.nano.export import TrainedValues
from tools.nano.network import Leaves, Network, initial_leaves
from tools.nano.stages import STAGES
from tools.nano.tokenizer import tokenizer_files

CONFIG = ModelConfig.load("nano")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    tokenizer = Tokenizer(json.dumps(tokenizer_files(CONFIG)["tokenizer.json"]))
    return Run("text", CONFIG, tokenizer, tmp_path, steps=100, seed=3)


@pytest.mark.parametrize("adapter", [pytest.param("vision", marks=pytest.mark.slow), "speech"])
def test_network_is_that_of_the_runtime(nano: Phi4MM, run: Run, adapter: str) -> None:
    """Logits of a row with speech, and a picture or not: by the trainer's forward pass, and by the model's prefill."""
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (60, 150, 3), np.uint8))
    clip = (rng.standard_normal(9000).astype(np.float32) * 0.1, 16_000)
    pictures = [picture] if adapter == "vision" else []
    text = f"<|user|>{'<|image_1|>' * len(pictures)}<|audio_1|>Say it.<|end|><|assistant|>"
    prompt = nano.processor.raw(text, pictures, [clip])
    expected = nano.logits(text, images=pictures, audios=[clip])

    network = Network(CONFIG)
    leaves = nano.steps.unpack(nano.weights)
    batch = Writer(run).batch([prompt.token_ids], len(prompt.token_ids), Random(0))
    audio = prompt.audios[0]
    features = np.zeros((1, LEAD + 8 * audio.num_tokens, 80), np.float32)
    features[0, LEAD : LEAD + len(audio.features)] = audio.features
    batch = batch._replace(
        use_long=np.array([False]),
        features=features,
        frames=np.array([len(audio.features)], np.int32),
        **(image_arrays(CONFIG, batch.tokens, [prompt.images], 5) if pictures else {}),
    )
    assert set(leaves) == set(network.shapes)
    logits = network.logits(leaves, jax.tree.map(jnp.asarray, batch), adapter)
    np.testing.assert_allclose(logits[0], expected, atol=2e-4)


def test_export_and_load_give_the_leaves_back(tmp_path: Path) -> None:
    leaves = {path: jnp.asarray(leaf, jnp.bfloat16) for path, leaf in initial_leaves(CONFIG, 1).items()}
    write_checkpoint(tmp_path / "nano", CONFIG, TrainedValues(leaves), unused=False)
    abstract = {p: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for p, shape in Network(CONFIG).shapes.items()}
    loaded, report = load(tmp_path / "nano", ModelConfig.from_checkpoint(tmp_path / "nano"), abstract, lambda _, x: x)
    assert not report.skipped
    for path, leaf in loaded.items():
        np.testing.assert_array_equal(leaf, leaves[path], err_msg=path)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_has_a_loss(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and dtypes of each stage's batches go through the loss, and every leaf that it trains has a gradient."""
    recordings = FakeRecordings()
    monkeypatch.setattr(batches, "Recordings", lambda _: recordings)
    stage, network = STAGES[name], Network(CONFIG)
    try:
        batch = stage.batches(dataclasses.replace(run, stage=name))(0)
    except FileNotFoundError as error:
        pytest.skip(str(error))  # fonts
    leaves = initial_leaves(CONFIG, 0)
    trained = {path: leaf for path, leaf in leaves.items() if stage.trains(path)}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trained}

    def loss(trained: Leaves) -> jax.Array:
        return network.loss(frozen | trained, jax.tree.map(jnp.asarray, batch), stage.adapter, stage.answers)[0]

    used = jax.make_jaxpr(jax.grad(loss))(trained)
    constants = [path for path, gradient in zip(sorted(trained), used.jaxpr.outvars, strict=True) if is_zero(gradient)]
    assert not constants


def is_zero(variable: object) -> bool:
    return isinstance(variable, jax.extend.core.Literal)


class FakeRecordings:
    """Noise with the texts of sentences and questions."""

    def __init__(self):
        asked = {kind: vocabulary.question(Random(0), kind) for kind in vocabulary.QUESTION_KINDS}
        self.texts = ("red cat", "my dog", *asked.values())
        self.kinds = ("sentence", "sentence", *asked)
        self.lengths = np.array([100, 150, 200, 210, 220])
        self.mean = np.full(80, 12.0, np.float32)

    def features(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).uniform(0, 20, (self.lengths[index], 80)).astype(np.float16)


class Interrupted(progress.Progress):
    """Ctrl-C at the third step."""

    def step(self, metrics: dict[str, jax.Array]) -> None:
        super().step(metrics)
        if self._index == 3:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the training libraries
def test_training_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_SECONDS_PER_CHECKPOINT", 0.0)
    monkeypatch.setattr(progress, "_STEPS_PER_LINE", 1)

    def run(name: str) -> None:
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            train.train(tmp_path / name, "text", steps=4)

    with monkeypatch.context() as patch:
        patch.setattr(train, "Progress", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("parts")
    with pytest.raises(train.TrainingError, match="stage text is not finished"):
        train.stage_leaves(tmp_path / "parts", "text")
    run("parts")
    run("whole")
    whole, parts = (train.stage_leaves(tmp_path / name, "text") for name in ("whole", "parts"))
    decoder = {path for path in Network(CONFIG).shapes if path.startswith("text.") and not path.endswith(("_a", "_b"))}
    assert set(whole) == decoder
    for path, leaf in whole.items():
        np.testing.assert_array_equal(leaf, parts[path], err_msg=path)
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "text" / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    assert [line["answer"] for line in parts] == [line["answer"] for line in whole]
    assert (tmp_path / "whole" / "text" / "loss.png").stat().st_size > 1000
    with pytest.raises(train.TrainingError, match="was begun with 4 steps, not 5"):
        train.train(tmp_path / "whole", "text", steps=5)


def test_a_stage_can_be_adopted(tmp_path: Path) -> None:
    assert train.main([str(tmp_path), "--stage", "text", "--adopt", str(BUNDLED["nano"])]) == 0
    leaves = train.stage_leaves(tmp_path, "text")
    assert set(leaves) == {path for path in Network(CONFIG).shapes if STAGES["text"].trains(path)}
    assert np.abs(leaves["text.norm.weight"] - 1).max() > 0.01  # trained
    with pytest.raises(train.TrainingError, match="was begun; remove it"):
        train.adopt(tmp_path, "text", BUNDLED["nano"])


def test_a_stage_needs_those_before_it(tmp_path: Path) -> None:
    with pytest.raises(train.TrainingError, match="stage text is not finished; run it first, with --stage text"):
        train.train(tmp_path, "vision")
    assert not list(tmp_path.iterdir())


def record_stage(tmp_path: Path, name: str, then: str = "") -> list[str]:
    """A command that notes when a stage begins and ends."""
    note = f"open({str(tmp_path / 'notes')!r}, 'a').write"
    return [sys.executable, "-c", f"import time; {note}('begin {name}\\n'); {then}\n{note}('end {name}\\n')"]


def test_stages_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_SECONDS_PER_LOOK", 0.02)
    used = []

    def command(name: str, processor: int) -> list[str]:
        used.append(processor)
        return record_stage(tmp_path, name, "time.sleep(0.3)")

    schedule.run_side_by_side(tmp_path / "run", [4, 7], command)
    running, ended, most = set(), set(), 0
    for line in (tmp_path / "notes").read_text().splitlines():
        event, name = line.split()
        if event == "begin":
            assert ended.issuperset(STAGES[name].after)
            running.add(name)
        else:
            running.remove(name)
            ended.add(name)
        most = max(most, len(running))
    assert ended == set(STAGES)
    assert most == 2
    assert set(used) == {4, 7}


def test_a_stage_that_fails_stops_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_SECONDS_PER_LOOK", 0.02)

    def command(name: str, _: int) -> list[str]:
        return record_stage(
            tmp_path, name, "time.sleep(1); raise SystemExit('no')" if name == "text" else "time.sleep(60)"
        )

    with pytest.raises(schedule.StageError, match=r"stage text ended with 1; what it printed is in .*text\.txt"):
        schedule.run_side_by_side(tmp_path / "run", [0, 1], command)
    assert (tmp_path / "run" / "text.txt").read_text() == "no\n"
    assert "KeyboardInterrupt" in (tmp_path / "run" / "looking.txt").read_text()
    assert set((tmp_path / "notes").read_text().splitlines()) == {"begin text", "begin looking"}


def test_missing_tools_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise FileNotFoundError("fonts not found: A.ttf; install B")

    monkeypatch.setattr(train, "fonts", missing)
    assert train.main([str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "error: fonts not found: A.ttf; install B\n"


def test_every_leaf_is_trained_in_some_stage() -> None:
    untrained = [path for path in Network(CONFIG).shapes if not any(s.trains(path) for s in STAGES.values())]
    assert untrained == ["audio.inv_std", "audio.mean"]  # measured, not trained
