"""The published tasks over rows as their datasets have them: exactly what is asked, and what is right."""

import json
import pickle
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from phi4mm_jax.evaluation.items import EvaluationError, Item
from phi4mm_jax.evaluation.metrics.registry import metric
from phi4mm_jax.evaluation.sources import open_source
from phi4mm_jax.evaluation.tasks.catalogue import CATALOGUE, find
from phi4mm_jax.evaluation.tasks.suite import Suite
from phi4mm_jax.evaluation.tasks.task import Columns, HubDataset, JoinedDataset, Task
from tools.hub_layout import write_dataset

TASKS = {task.name: task for entry in CATALOGUE for task in (entry.tasks if isinstance(entry, Suite) else [entry])}
TRANSCRIBE = "Transcribe the audio clip into text."
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def medium(content: bytes) -> dict[str, Any]:
    return {"bytes": content, "path": None}


CLIP, PICTURE = medium(b"a clip"), medium(b"a picture")


def read(directory: Path, task: Task, *rows: Mapping[str, Any]) -> list[Item]:
    """The items of rows that went through a dataset in the hub's layout, by a task as workers get it."""
    assert isinstance(task.source, HubDataset)
    write_dataset(directory, {task.source.config or "default": {task.source.split: rows}})
    source = open_source(task.source, directory)
    task = pickle.loads(pickle.dumps(task))
    return [item for i in range(len(source)) for item in task.items(i, source[i], source.directory)]


# --- the catalogue -------------------------------------------------------------------------------------------


def test_names_are_unique_and_parts_bear_their_suites() -> None:
    names = [entry.name for entry in CATALOGUE] + [
        task.name for entry in CATALOGUE if isinstance(entry, Suite) for task in entry.tasks
    ]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[a-z0-9-]+(/[a-z0-9-]+)?", name)
    for entry in CATALOGUE:
        if isinstance(entry, Suite):
            assert all(task.name.startswith(f"{entry.name}/") for task in entry.tasks)
        else:
            assert "/" not in entry.name


@pytest.mark.parametrize("entry", [*CATALOGUE, *TASKS.values()], ids=lambda entry: entry.name)
def test_what_is_published_has_a_source(entry: Task | Suite) -> None:
    assert entry.title
    if entry.published:
        assert 0 < entry.published.score < 100
        assert re.search(r"leaderboard|second-hand", entry.published.source)


@pytest.mark.parametrize("name", sorted({task.metric for task in TASKS.values()}))
def test_metrics_are_known(name: str) -> None:
    assert metric(name).name == name


@pytest.mark.parametrize(("name", "digits"), [("open-asr-2025", 2), ("multilingual-asr", 2), ("s-vision-speech", 1)])
def test_published_means_are_those_of_the_published_parts(name: str, digits: int) -> None:
    suite = find(name)
    assert round(statistics.fmean(task.published.score for task in suite.tasks), digits) == suite.published.score


def test_find_takes_tasks_suites_and_parts() -> None:
    assert find("docvqa") is TASKS["docvqa"]
    assert find("open-asr") in CATALOGUE
    assert find("open-asr/ami") in find("open-asr").tasks


def test_what_a_known_task_asks_is_not_changed() -> None:
    assert find("docvqa", metric=None) is TASKS["docvqa"]
    with pytest.raises(EvaluationError, match="docvqa: has its own metric"):
        find("docvqa", metric="exact")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("docvqua", "no task 'docvqua'.*docvqa"),
        ("open-asr/amy", "open-asr/ami"),
        ("open_asr", "open-asr"),
        ("qqqqqqqqqqqqqqqqqqqqqqqq", "open-asr, .*nano"),
        ("absent.jsonl", "absent.jsonl: no such file"),
    ],
)
def test_an_unknown_name_is_told_the_nearest(name: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        find(name)


# --- recognition ---------------------------------------------------------------------------------------------

_LEADERBOARD_ROW = {"audio": CLIP, "dataset": "ami", "text": "Good, uh, morning", "id": "AMI_7", "audio_length_s": 1.5}
_FLEURS_ROW = {
    "id": 1675,
    "num_samples": 160000,
    "path": "a.wav",
    "audio": CLIP,
    "transcription": "guten morgen",
    "raw_transcription": "Guten Morgen!",
    "gender": 1,
    "lang_id": 19,
    "language": "German",
    "lang_group_id": 0,
}
_COMMON_VOICE_ROW = {"client_id": "c", "path": "common_voice_de_1.mp3", "audio": CLIP, "sentence": "Guten Morgen."}
_RECOGNITION = {
    "open-asr": (_LEADERBOARD_ROW, "AMI_7", "Good, uh, morning"),
    "open-asr-2025": (_LEADERBOARD_ROW, "AMI_7", "Good, uh, morning"),
    "multilingual-asr": ({"audio": CLIP, "file_name": "1.wav", "text": "Guten Morgen"}, "1.wav", "Guten Morgen"),
    "fleurs-asr": (_FLEURS_ROW, "1675", "guten morgen"),
    "common-voice-asr": (_COMMON_VOICE_ROW, "common_voice_de_1.mp3", "Guten Morgen."),
}


@pytest.mark.parametrize(
    "task", [task for name in _RECOGNITION for task in find(name).tasks], ids=lambda task: task.name
)
def test_recognition(task: Task, tmp_path: Path) -> None:
    row, name, text = _RECOGNITION[task.name.partition("/")[0]]
    assert read(tmp_path, task, row) == [
        Item(id="0", name=name, prompt=TRANSCRIBE, audios=(b"a clip",), references=(text,))
    ]
    assert task.max_tokens == 128


@pytest.mark.parametrize(
    ("name", "source", "metric"),
    [
        ("open-asr/ami", HubDataset(repo="hf-audio/open-asr-leaderboard", config="ami_cleaned"), "wer"),
        (
            "open-asr/librispeech-other",
            HubDataset(repo="hf-audio/open-asr-leaderboard", config="librispeech", split="test.other"),
            "wer",
        ),
        ("open-asr-2025/tedlium", HubDataset(repo="hf-audio/esb-datasets-test-only-sorted", config="tedlium"), "wer"),
        (
            "multilingual-asr/mls-pt",
            HubDataset(repo="hf-audio/open-asr-leaderboard-multilingual-datasets", config="mls_pt"),
            "wer:pt",
        ),
        (
            "fleurs-asr/zh",
            HubDataset(repo="google/fleurs", config="cmn_hans_cn", revision="refs/convert/parquet"),
            "cer:zh",
        ),
        ("common-voice-asr/zh", HubDataset(repo="mozilla-foundation/common_voice_15_0", config="zh-CN"), "cer:zh"),
        ("common-voice-asr/en", HubDataset(repo="mozilla-foundation/common_voice_15_0", config="en"), "wer"),
    ],
)
def test_sources_and_metrics_of_recognition(name: str, source: HubDataset, metric: str) -> None:
    task = find(name)
    assert (task.source, task.metric) == (source, metric)


# --- translation ---------------------------------------------------------------------------------------------


def test_covost2(tmp_path: Path) -> None:
    task = find("covost2/de-en")
    row = {
        "client_id": "c",
        "file": "common_voice_de_1.mp3",
        "audio": CLIP,
        "sentence": "Guten Morgen.",
        "translation": "Good morning.",
        "id": "common_voice_de_1",
    }
    assert read(tmp_path, task, row) == [
        Item(
            id="0",
            name="common_voice_de_1",
            prompt="Translate the audio to English.",
            audios=(b"a clip",),
            references=("Good morning.",),
        )
    ]
    assert (task.metric, task.max_tokens, task.source.config) == ("bleu", 256, "de_en")
    assert find("covost2/zh-en").source.config == "zh-CN_en"


def test_covost2_through_the_transcript(tmp_path: Path) -> None:
    task = find("covost2-from-english-chain/en-ja")
    row = {"audio": CLIP, "sentence": "Good morning.", "translation": "おはよう。", "id": "1", "file": "1.mp3"}
    assert read(tmp_path, task, row) == [
        Item(
            id="0",
            name="1",
            prompt="Transcribe the audio to text, and then translate the audio to Japanese. Use <sep> as a separator "
            "between the original transcript and the translation.",
            audios=(b"a clip",),
            references=("おはよう。",),
            facts={"transcript": "Good morning."},
        )
    ]
    assert (task.metric, task.source.config) == ("wer+sep+bleu:ja", "en_ja")


def test_fleurs_pairs_are_joined_by_number(tmp_path: Path) -> None:
    direct = find("fleurs-translation-from-english/en-zh")
    chain = find("fleurs-translation-from-english-chain/en-zh")
    assert (direct.metric, chain.metric) == ("bleu:zh", "wer+sep+bleu:zh")
    assert isinstance(direct.source, JoinedDataset)
    assert direct.source == chain.source
    assert {direct.source.rows.repo, direct.source.counterparts.repo} == {"google/fleurs"}
    english = [
        _FLEURS_ROW | {"id": number, "raw_transcription": f"Sentence {number}.", "audio": medium(b"clip %d" % i)}
        for i, number in enumerate([7, 3, 7, 5])
    ]
    chinese = [
        _FLEURS_ROW | {"id": number, "raw_transcription": f"{number} 号句子。", "audio": medium(b"unused %d" % i)}
        for i, number in enumerate([3, 9, 7, 7])
    ]
    write_dataset(tmp_path, {"en_us": {"test": english}, "cmn_hans_cn": {"test": chinese}}, shards=2)
    rows = open_source(direct.source, tmp_path)
    items = [item for i in range(len(rows)) for item in direct.items(i, rows[i], rows.directory)]
    assert [(item.name, item.audios, item.references) for item in items] == [
        ("7", (b"clip 0",), ("7 号句子。",)),
        ("3", (b"clip 1",), ("3 号句子。",)),
        ("7", (b"clip 2",), ("7 号句子。",)),  # and 5 has no counterpart
    ]
    assert {item.prompt for item in items} == {"Translate the audio to Chinese."}
    [item] = chain.items(1, rows[1])
    assert item.facts == {"transcript": "Sentence 3."}


def test_one_table_is_joined_already(tmp_path: Path) -> None:
    task = find("fleurs-translation/de-en")
    line = {"audio": "1.wav", "raw_transcription": "Guten Morgen.", "translation": "Good morning."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line))
    rows = open_source(task.source, tmp_path / "pairs.jsonl")
    [item] = task.items(0, rows[0], rows.directory)
    assert (item.audios, item.references) == ((tmp_path / "1.wav",), ("Good morning.",))


def test_what_cannot_be_joined_is_told(tmp_path: Path) -> None:
    task = find("fleurs-translation/de-en")
    german = [{"id": 1, "raw_transcription": "Eins."}]
    for english, message in (
        ([{"id": 2, "raw_transcription": "Two."}], "no row has the 'id' of one of .*en_us"),
        ([{"id": 1, "text": "One."}], "en_us.*no column 'raw_transcription'"),
    ):
        write_dataset(tmp_path, {"de_de": {"test": german}, "en_us": {"test": english}})
        with pytest.raises(EvaluationError, match=message):
            open_source(task.source, tmp_path)


# --- pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["docvqa", "infovqa"])
def test_documents(name: str, tmp_path: Path) -> None:
    row = {
        "questionId": "337",
        "question": "What is the date?",
        "question_types": ["handwritten"],
        "image": PICTURE,
        "docId": 279,
        "answers": ["1/8/93", "1/8/1993"],
        "data_split": "val",
    }
    assert read(tmp_path, TASKS[name], row) == [
        Item(
            id="0",
            name="337",
            prompt="What is the date?" + SHORT,
            images=(b"a picture",),
            references=("1/8/93", "1/8/1993"),
        )
    ]
    assert (TASKS[name].metric, TASKS[name].max_tokens) == ("anls", 32)


def test_chartqa(tmp_path: Path) -> None:
    row = {"type": "human_test", "question": "How many bars?", "answer": "14", "image": PICTURE}
    assert read(tmp_path, TASKS["chartqa"], row) == [
        Item(
            id="0",
            name="0",
            prompt="How many bars?\nAnswer the question with a single word.",
            images=(b"a picture",),
            references=("14",),
            facts={"subset": "human_test"},
        )
    ]


def test_textvqa(tmp_path: Path) -> None:
    answers = ["nokia"] * 9 + ["toshiba"]
    row = {
        "image_id": "003a8ae2ef43b901",
        "question_id": 34602,
        "question": "what is the brand of this {camera}?",
        "image": PICTURE,
        "image_width": 1024,
        "answers": answers,
        "set_name": "val",
    }
    assert read(tmp_path, TASKS["textvqa"], row) == [
        Item(
            id="0",
            name="34602",
            prompt="what is the brand of this {camera}?" + SHORT,
            images=(b"a picture",),
            references=tuple(answers),
        )
    ]


def test_ocrbench(tmp_path: Path) -> None:
    row = {
        "dataset": "HME100k",
        "question": "Please write out the expression of the formula in the image using LaTeX format.",
        "question_type": "Handwritten Mathematical Expression Recognition",
        "answer": [r"\frac { 1 } { 2 }"],
        "image": PICTURE,
    }
    assert read(tmp_path, TASKS["ocrbench"], row) == [
        Item(
            id="0",
            name="0",
            prompt=row["question"],
            images=(b"a picture",),
            references=(r"\frac { 1 } { 2 }",),
            facts={"subset": row["question_type"], "dataset": "HME100k"},
        )
    ]


@pytest.mark.parametrize("given", [".", "copies", "copies/lmms-lab", "copies/lmms-lab/DocVQA"])
def test_a_copy_of_a_repository_is_found_from_above(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"questionId": "1", "question": "?", "image": PICTURE, "answers": ["a"]}]
    monkeypatch.chdir(tmp_path)
    copy = Path("DocVQA" if given == "." else "copies/lmms-lab/DocVQA")
    write_dataset(copy, {config: {"validation": rows} for config in ("DocVQA", "InfographicVQA")})
    assert len(open_source(TASKS["docvqa"].source, given)) == 1


# --- choices -------------------------------------------------------------------------------------------------


def test_ai2d(tmp_path: Path) -> None:
    row = {"question": "Which eats grass?", "options": ["fox", "hare", "owl"], "answer": "1", "image": PICTURE}
    assert read(tmp_path, TASKS["ai2d"], row) == [
        Item(
            id="0",
            name="0",
            prompt=f"Which eats grass?\nA. fox\nB. hare\nC. owl\n{LETTER}",
            images=(b"a picture",),
            references=("B",),
            facts={"options": {"A": "fox", "B": "hare", "C": "owl"}},
        )
    ]


_MMBENCH_ROW = {
    "index": "241",
    "question": "Which is true?",
    "hint": "Look closely.",
    "answer": "C",
    "A": "one",
    "B": "two",
    "C": "three",
    "D": "nan",
    "category": "counting",
    "image": PICTURE,
    "source": "us",
    "L2-category": "perception",
    "comment": "nan",
    "split": "dev",
}


def test_mmbench_asks_every_rotation(tmp_path: Path) -> None:
    rotation = _MMBENCH_ROW | {"index": "1000241", "A": "two", "B": "three", "C": "one", "answer": "B"}
    items = read(tmp_path, TASKS["mmbench"], _MMBENCH_ROW, rotation)
    assert [item.id for item in items] == ["0.0", "0.1", "0.2"]
    assert items[0] == Item(
        id="0.0",
        name="241",
        prompt="Hint: Look closely.\nQuestion: Which is true?\nOptions:\nA. one\nB. two\nC. three\n"
        "Please select the correct answer from the options above. \n",
        images=(b"a picture",),
        references=("C",),
        facts={"options": {"A": "one", "B": "two", "C": "three"}, "subset": "perception", "group": 241},
    )
    assert [item.facts["options"] for item in items[1:]] == [
        {"A": "two", "B": "three", "C": "one"},  # as the dataset rotates it
        {"A": "three", "B": "one", "C": "two"},
    ]
    assert [item.references for item in items[1:]] == [("B",), ("A",)]
    assert {item.facts["group"] for item in items} == {241}
    assert "Options:\nA. three\nB. one\nC. two\n" in items[2].prompt


@pytest.mark.parametrize("hint", [None, "nan", ""])
def test_mmbench_without_a_hint(hint: str | None) -> None:
    first, *_ = TASKS["mmbench"].items(0, _MMBENCH_ROW | {"hint": hint, "image": PICTURE})
    assert first.prompt.startswith("Question: Which is true?\n")


def mmmu_row(**changed: Any) -> dict[str, Any]:
    pictures = {f"image_{n}": medium(b"picture %d" % n) if n <= 3 else None for n in range(1, 8)}
    return {
        "id": "validation_Art_Theory_12",
        "question": "Which of <image 1> and <image 3> is older?",
        "options": "['<image 1>', \"the painter's\", '5']",
        "explanation": "",
        **pictures,
        "img_type": "['Paintings']",
        "answer": "B",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Art",
    } | changed


def test_mmmu_shows_the_pictures_that_its_text_names(tmp_path: Path) -> None:
    assert read(tmp_path, TASKS["mmmu"], mmmu_row()) == [
        Item(
            id="0",
            name="validation_Art_Theory_12",
            prompt="Which of <image 1> and <image 3> is older?\nA. <image 1>\nB. the painter's\nC. 5\n\n" + LETTER,
            images=(b"picture 1", b"picture 3"),
            references=("B",),
            facts={"subset": "Art_Theory", "options": {"A": "<image 1>", "B": "the painter's", "C": "5"}},
        )
    ]


@pytest.mark.parametrize(
    ("answer", "references"),
    [("0.5", ("0.5",)), ("['24/7', '3.429']", ("24/7", "3.429")), ("[1, 2)", ("[1, 2)",)), ("a [b]", ("a [b]",))],
)
def test_mmmu_open(answer: str, references: tuple[str, ...]) -> None:
    row = mmmu_row(question="How far in <image 2>?", options="[]", answer=answer, question_type="open")
    [item] = TASKS["mmmu"].items(5, row)
    assert item.prompt == "How far in <image 2>?\n" + SHORT
    assert (item.images, item.references, item.facts["options"]) == ((b"picture 2",), references, {})


def test_mmmu_does_not_run_what_a_row_says() -> None:
    with pytest.raises(EvaluationError, match="a list in Python's notation"):
        TASKS["mmmu"].items(0, mmmu_row(options="[open('/etc/passwd').read()]"))


# --- spoken --------------------------------------------------------------------------------------------------


def test_spoken_questions(tmp_path: Path) -> None:
    row = {"image": PICTURE, "audio": CLIP, "answers": ["14"]}
    for task in find("s-vision-speech").tasks[1:]:
        [item] = read(tmp_path / task.name, task, row)
        assert item == Item(id="0", name="0", images=(b"a picture",), audios=(b"a clip",), references=("14",))
        assert task.source.repo is None
    assert [task.metric for task in find("s-vision-speech").tasks] == [
        "letter",
        "relaxed_accuracy",
        "anls",
        "anls",
    ]


@pytest.mark.parametrize("answer", ["1", 1, "B"])
def test_spoken_choices(answer: str | int) -> None:
    task = TASKS["s-vision-speech/ai2d"]
    [item] = task.items(0, {"image": PICTURE, "audio": CLIP, "answer": answer, "options": ["fox", "hare"]})
    assert (item.prompt, item.references, item.facts) == ("", ("B",), {"options": {"A": "fox", "B": "hare"}})
    [item] = task.items(0, {"image": PICTURE, "audio": CLIP, "answer": answer})
    assert item.facts == {"options": {}}


def test_summaries(tmp_path: Path) -> None:
    [item] = read(tmp_path, TASKS["ami-summaries"], {"audio": CLIP, "summary": "They met."})
    assert (item.prompt, item.audios, item.references) == ("Summarize the audio.", (b"a clip",), ("They met.",))


@pytest.mark.parametrize("layout", ["parquet", "jsonl", "folder"])
def test_rows_that_the_hub_lacks_are_named_by_their_part(layout: str, tmp_path: Path) -> None:
    task = TASKS["s-vision-speech/docvqa"]
    row = {"image": "1.png", "audio": "1.wav", "answers": ["14"]}
    match layout:
        case "parquet":
            write_dataset(tmp_path, {"docvqa": {"test": [row]}, "ai2d": {"test": [row]}})
        case "jsonl":
            (tmp_path / "docvqa.jsonl").write_text(json.dumps(row))
            (tmp_path / "ai2d.jsonl").write_text("")
        case "folder":
            (tmp_path / "docvqa").mkdir()
            (tmp_path / "docvqa" / "manifest.jsonl").write_text(json.dumps(row))
    source = open_source(task.source, tmp_path)
    assert len(source) == 1
    [item] = task.items(0, source[0], source.directory)
    assert Path(item.audios[0]).name == "1.wav"
    with pytest.raises(EvaluationError, match=r"docvqa: the hub has no such rows.*--data.*docvqa\.jsonl"):
        open_source(task.source)


# --- rows that do not fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("docvqa", {"question": "?", "image": PICTURE}, "docvqa: row 3 has none of the columns answers, answer"),
        ("docvqa", {"image": PICTURE, "answers": ["a"]}, "docvqa: row 3 has no column 'question'"),
        ("ai2d", {"question": "?", "image": PICTURE, "answer": "1"}, "ai2d: row 3 has no column 'options'"),
        ("ocrbench", {"question": "?", "answer": ["a"]}, "ocrbench: row 3 has no column 'dataset'"),
        ("covost2-chain/de-en", {"audio": CLIP, "translation": "a"}, "row 3 has no column 'raw_transcription'"),
    ],
)
def test_a_row_that_lacks_something_is_told_what(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=re.escape(message)):
        TASKS[name].items(3, row)


def test_facts_are_json() -> None:
    items = [
        *TASKS["mmbench"].items(0, _MMBENCH_ROW),
        *TASKS["mmmu"].items(0, mmmu_row()),
        *TASKS["ai2d"].items(0, {"question": "?", "options": ["a"], "answer": "0", "image": PICTURE}),
    ]
    for item in items:
        assert json.loads(json.dumps(item.facts)) == item.facts


def test_columns_that_a_task_names_need_not_all_be_there() -> None:
    task = Task(name="t", title="t", source=HubDataset(repo=None), columns=Columns(subset=("a", "b")), metric="exact")
    [item] = task.items(0, {"question": "q", "answer": 5, "b": 2})
    assert (item.references, item.facts) == (("5",), {"subset": "2"})
