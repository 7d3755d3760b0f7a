"""The small sets for `nano/...` tasks: every part has rows, and the bundled model answers them through its tasks."""

from pathlib import Path

import numpy as np
import pytest

from phi4mm_jax.api import Phi4MM
from phi4mm_jax.evaluation.items import Item
from phi4mm_jax.evaluation.metrics.registry import metric
from phi4mm_jax.evaluation.sources import open_source
from phi4mm_jax.evaluation.tasks.catalogue import find
from phi4mm_jax.evaluation.tasks.task import Task
from tools.nano.evaluation_sets import main

HELD_OUT = Path(__file__).parent / "heldout"
NANO = find("nano")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sets") / "out"
    main([str(out), "--cases", str(HELD_OUT)])
    return out


def items(task: Task, data: Path | None = None) -> list[Item]:
    source = open_source(task.source, data)
    return [item for i in range(len(source)) for item in task.items(i, source[i], source.directory)]


def answers(nano: Phi4MM, asked: list[Item]) -> list[str]:
    conversations = []
    for item in asked:
        parts = [{"type": "image", "image": image} for image in item.images]
        parts += [{"type": "audio", "audio": audio} for audio in item.audios]
        conversations.append([{"role": "user", "content": [*parts, {"type": "text", "text": item.prompt}]}])
    return [output.text for output in nano.generate(conversations, max_tokens=48)]


@pytest.mark.parametrize("task", NANO.tasks, ids=lambda task: task.name)
def test_every_part_has_rows(task: Task, sets: Path) -> None:
    assert len(items(task, sets)) >= 5


def test_a_choice_has_the_right_option_once(sets: Path) -> None:
    task = find("nano/choice")
    figures = find("nano/figures")
    for item, figure in zip(items(task, sets), items(figures, sets), strict=True):
        options = item.facts["options"]
        assert list(options) == ["A", "B", "C", "D"]
        assert len(set(options.values())) == 4
        assert options[item.references[0]] == figure.references[0].split()[0]


@pytest.mark.parametrize(
    ("name", "least"), [("nano/text", 0.9), ("nano/figures", 0.8), ("nano/choice", 0.8), ("nano/spoken", 0.8)]
)
def test_the_model_answers_its_sets(name: str, least: float, nano: Phi4MM, sets: Path) -> None:
    task = find(name)
    asked = items(task, sets)
    measured = [
        metric(task.metric).measure(answer, item.references, item.facts)
        for answer, item in zip(answers(nano, asked), asked, strict=True)
    ]
    assert metric(task.metric).score(np.sum(measured, axis=0, dtype=float)) >= 100 * least


def test_files_of_ones_own(nano: Phi4MM, sets: Path) -> None:
    questions, recordings = (find(str(sets / "custom" / name)) for name in ("questions.jsonl", "recordings.jsonl"))
    assert (questions.metric, recordings.metric) == ("exact", "wer")
    asked = items(recordings)
    assert {item.prompt for item in asked} == {"Transcribe the audio clip into text."}
    assert sum(answer == item.references[0] for answer, item in zip(answers(nano, asked), asked, strict=True)) >= 5
    kinds = {(len(item.images), len(item.audios)) for item in items(questions)}
    assert kinds == {(0, 0), (1, 0), (2, 0), (1, 1)}


def test_cases_of_another_kind_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cases.json").write_text("[]")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out"), "--cases", str(tmp_path)])
    assert "has no cases of the held-out tests" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
