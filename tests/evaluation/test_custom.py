"""Tasks of one's own: what the first row says about the form of all."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from phi4mm_jax.evaluation.items import EvaluationError, Item
from phi4mm_jax.evaluation.sources import open_source
from phi4mm_jax.evaluation.tasks.catalogue import find
from phi4mm_jax.evaluation.tasks.custom import custom
from phi4mm_jax.evaluation.tasks.task import Task


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def items(task: Task) -> list[Item]:
    source = open_source(task.source)
    task = pickle.loads(pickle.dumps(task))
    return [item for i in range(len(source)) for item in task.items(i, source[i], source.directory)]


def test_a_manifest_of_speech_recognition(tmp_path: Path) -> None:
    path = write(
        tmp_path / "Calls.jsonl",
        {"audio_filepath": "a/1.wav", "duration": 2.5, "text": "Good morning.", "pred_text": "good"},
        {"audio_filepath": "/data/2.wav", "duration": 1.5, "text": "Yes."},
    )
    task = custom(path)
    assert (task.name, task.title, task.metric, task.max_tokens) == ("calls", "Calls.jsonl", "wer", 128)
    assert items(task) == [
        Item(
            id="0",
            name="a/1.wav",
            prompt="Transcribe the audio clip into text.",
            audios=(tmp_path / "a/1.wav",),
            references=("Good morning.",),
        ),
        Item(
            id="1",
            name="/data/2.wav",
            prompt="Transcribe the audio clip into text.",
            audios=(Path("/data/2.wav"),),
            references=("Yes.",),
        ),
    ]


def test_questions_of_all_kinds(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl",
        {"id": "x", "image": "1.png", "prompt": "What?", "answers": ["a", "b"], "metric": "anls", "subset": "easy"},
        {"images": ["1.png", "2.png"], "audio": "1.wav", "prompt": "", "answers": "c", "metric": "anls"},
    )
    first, second = items(custom(path))
    assert first == Item(
        id="0",
        name="x",
        prompt="What?",
        images=(tmp_path / "1.png",),
        references=("a", "b"),
        facts={"subset": "easy"},
    )
    assert second == Item(
        id="1",
        name="1",
        images=(tmp_path / "1.png", tmp_path / "2.png"),
        audios=(tmp_path / "1.wav",),
        references=("c",),
    )


def test_arguments_come_before_what_rows_say(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", {"question": "Who?", "answer": "Ann", "place": "Rome"})
    task = custom(path, metric="exact", prompt="{question} In {place}, {{briefly}}.", max_tokens=5)
    assert (task.metric, task.max_tokens) == ("exact", 5)
    [item] = items(task)
    assert item.prompt == "Who? In Rome, {briefly}."


def test_spoken_questions_need_no_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", {"image": "1.png", "audio": "1.wav", "answer": "Ann", "metric": "exact"})
    [item] = items(custom(path))
    assert (item.prompt, len(item.images), len(item.audios)) == ("", 1, 1)


def test_options_are_by_letter(tmp_path: Path) -> None:
    row = {"prompt": "A. one\nB. two", "options": ["one", "two"], "answer": "B", "metric": "mmbench"}
    [item] = items(custom(write(tmp_path / "mine.jsonl", row)))
    assert item.facts == {"options": {"A": "one", "B": "two"}}


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text('image,question,answer\n1.png,"What, then?",4\n')
    [item] = items(custom(tmp_path / "mine.csv", metric="exact"))
    assert (item.prompt, item.references, item.images) == ("What, then?", ("4",), (tmp_path / "1.png",))


def test_folder_of_recordings_with_texts(tmp_path: Path) -> None:
    (tmp_path / "1.wav").touch()
    (tmp_path / "1.txt").write_text("good morning\n")
    task = custom(tmp_path)
    assert task.metric == "wer"
    [item] = items(task)
    assert (item.name, item.references, item.audios) == ("1", ("good morning",), (tmp_path / "1.wav",))


def test_a_path_is_found_as_a_task(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", {"question": "Who?", "answer": "Ann", "metric": "exact"})
    assert find(str(path)).name == "mine"
    assert find(str(path), max_tokens=7).max_tokens == 7


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        ({"question": "Who?", "answer": "Ann"}, {}, "mine.jsonl: name a metric.*question, answer"),
        ({"image": "1.png", "answer": "Ann"}, {"metric": "exact"}, "nothing is asked: no column prompt or question"),
        ({"q": "Who?", "answer": "Ann"}, {"metric": "exact", "prompt": "{p}"}, "no column 'p'.*q, answer"),
        ({"q": "Who?", "answer": "Ann"}, {"metric": "exact", "prompt": "{q"}, "a brace that is meant"),
    ],
)
def test_what_is_missing_is_told_before_anything_runs(
    row: dict[str, Any], arguments: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match=message):
        custom(write(tmp_path / "mine.jsonl", row), **arguments)


def test_one_task_has_one_metric(tmp_path: Path) -> None:
    rows = [{"prompt": "Who?", "answer": "Ann", "metric": metric} for metric in ("exact", "anls")]
    with pytest.raises(EvaluationError, match="'anls', others for 'exact'"):
        items(custom(write(tmp_path / "mine.jsonl", *rows)))
