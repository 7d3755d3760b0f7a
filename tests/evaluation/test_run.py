"""Whole evaluations of the bundled model: right scores, and the same results however the run was cut."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jiwer
import pytest
import sacrebleu
from whisper_normalizer.english import EnglishTextNormalizer

from phi4mm_jax.evaluation.gathering import merge
from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.run import evaluate
from phi4mm_jax.evaluation.tasks.custom import custom
from phi4mm_jax.runtime.memory import MemoryPlanError, plan_memory
from phi4mm_jax.service import Service

DIFFERS = {"session", "elapsed", "seconds"}
"""What of an answered item depends on the run."""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(out, task):
    """Items by id, of all shards; none may be there twice."""
    found = [item for path in sorted((out / task.replace("/", "__")).glob("items-*.jsonl")) for item in lines(path)]
    assert len(found) == len({item["id"] for item in found})
    return {item["id"]: {k: v for k, v in item.items() if k not in DIFFERS} for item in found}


def without_the_run(summary):
    return {k: v for k, v in summary.items() if k not in ("speed", "hardware", "settings")}


def distance(a, b):
    """Levenshtein's, by its definition."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def anls(prediction, references):
    best = max(1 - distance(r.lower(), prediction.lower()) / max(len(r), len(prediction), 1) for r in references)
    return best if best >= 0.5 else 0.0


def rate(items):
    normalize = EnglishTextNormalizer()
    return 100 * jiwer.wer([normalize(i["references"][0]) for i in items], [normalize(i["prediction"]) for i in items])


def share(right):
    return lambda items: 100 * sum(map(right, items)) / len(items)


def translated(items):
    after = [item["prediction"].split("<sep>")[-1].strip() for item in items]
    return sacrebleu.corpus_bleu(after, [[item["references"][0] for item in items]]).score


SCORES = {
    "nano/text": share(lambda i: i["prediction"] == i["references"][0]),
    "nano/asr": rate,
    "nano/translation": translated,
    "nano/reading": share(lambda i: anls(i["prediction"], i["references"])),
    "nano/ocr": share(lambda i: any(r in i["prediction"] for r in i["references"])),
    "nano/choice": share(lambda i: i["facts"]["options"][i["references"][0]] in i["prediction"]),
    "nano/figures": share(lambda i: i["prediction"] == i["references"][0]),
    "nano/pairs": share(lambda i: i["prediction"] == i["references"][0]),
    "nano/spoken": share(lambda i: i["prediction"] == i["references"][0]),
}


@pytest.fixture(scope="module")
def whole(nano, sets, tmp_path_factory):
    """Everything, in one go: where it was written, and the results."""
    out = tmp_path_factory.mktemp("whole")
    return out, {found.name: found for found in evaluate("nano", nano, data=sets, out=out, progress=False)}


def test_every_kind_of_task_is_scored_as_by_hand(whole):
    out, results = whole
    assert results.keys() == SCORES.keys()
    for name, found in results.items():
        assert found.score == pytest.approx(SCORES[name](list(answered(out, name).values()))), name
        saved = json.loads((out / name.replace("/", "__") / "results.json").read_text())
        assert saved["score"] == found.score
        assert saved["counts"]["items"] == len(answered(out, name)) and not saved["counts"]["errors"]
    assert results["nano/text"].score > 90 and results["nano/asr"].score < 50  # it does hear and answer


def test_answers_are_those_of_the_model(whole, nano, sets):
    """Alone, in no batch."""
    out, _ = whole
    rows = custom(sets / "custom" / "questions.jsonl")
    found = evaluate(rows, nano, limit=3, out=out / "own", progress=False)[0]
    for item, line in zip(found.answered, lines(sets / "custom" / "questions.jsonl"), strict=False):
        assert item.prediction == nano.generate([{"role": "user", "content": line["prompt"]}], max_tokens=128).text


def test_speed_adds_up(whole):
    for found in whole[1].values():
        speed = found.speed
        assert speed.seconds > 0 and sum(speed.stages.values()) == pytest.approx(speed.seconds, rel=0.05)
        assert all(0 <= padding < 1 for padding in speed.padding.values())
    assert whole[1]["nano/asr"].speed.rtfx and not whole[1]["nano/text"].speed.rtfx


def test_again_asks_nothing(whole, nano, sets):
    out, results = whole
    before = (out / "nano__asr" / "items-1-of-1.jsonl").read_bytes()
    [again] = evaluate("nano/asr", nano, data=sets, out=out, progress=False)
    assert again.score == results["nano/asr"].score
    assert (out / "nano__asr" / "items-1-of-1.jsonl").read_bytes() == before


def test_other_settings_are_refused(whole, nano, sets):
    with pytest.raises(EvaluationError, match="nano__asr: was begun with limit = None, not 3; go on with that, or"):
        evaluate("nano/asr", nano, data=sets, out=whole[0], limit=3, progress=False)


def test_rows_that_were_changed_are_refused(nano, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    for answers in (["5"], ["6"]):
        rows.write_text(json.dumps({"prompt": "What is 2 plus 3?", "answers": answers, "metric": "exact"}) + "\n")
        if answers == ["5"]:
            evaluate(rows, nano, out=out, progress=False)
    with pytest.raises(EvaluationError, match="was begun with fingerprint"):
        evaluate(rows, nano, out=out, progress=False)


def test_two_shards_merged_are_one_run(whole, nano, sets, tmp_path):
    out, results = whole
    for shard in ("1/2", "2/2"):
        evaluate(["nano/reading", "nano/spoken"], nano, data=sets, out=tmp_path / shard[0], shard=shard, progress=False)
    merged = {found.name: found for found in merge([tmp_path / "1", tmp_path / "2"], tmp_path / "both", data=sets)}
    for name in ("nano/reading", "nano/spoken"):
        parts = answered(tmp_path / "1", name), answered(tmp_path / "2", name)
        assert not parts[0].keys() & parts[1].keys()
        assert parts[0] | parts[1] == answered(out, name)
        assert without_the_run(merged[name].summary()) == without_the_run(results[name].summary())
    with pytest.raises(EvaluationError, match="shard 2 of 2 is missing"):
        merge([tmp_path / "1"], tmp_path / "both")


def test_bad_items_are_counted_and_not_fatal(nano, sets, tmp_path):
    good = lines(sets / "custom" / "recordings.jsonl")[:2]
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    rows = [good[0], {**good[0], "audio_filepath": "broken.wav"}, {**good[0], "audio_filepath": "none.wav"}, good[1]]
    for row in (rows[0], rows[3]):
        row["audio_filepath"] = str(sets / "custom" / row["audio_filepath"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [found] = evaluate(tmp_path / "rows.jsonl", nano, out=tmp_path / "out", progress=False)
    assert (found.counts.items, found.counts.answered, found.counts.errors) == (4, 2, 2)
    items = answered(tmp_path / "out", "rows")
    assert "broken.wav" in items["1"]["error"] and "none.wav" in items["2"]["error"]
    assert found.score == pytest.approx(rate(list(items.values())))  # they count as empty answers
    assert "none.wav" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": "docvqaa"}, "no task 'docvqaa'.*docvqa"),
        ({"tasks": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"batch": 0}, "batch = 0: expected 'auto' or at least 1"),
        ({"out": __file__}, r"test_run\.py: cannot be made a directory \(File exists\)"),
        ({"limit": 0}, "limit 0: expected at least 1"),
        ({"shard": "3/2"}, "shard 3/2: expected I/N with I from 1 to N"),
        ({"shard": "half"}, "shard 'half': expected I/N"),
        ({"workers": 0}, "workers = 0: expected at least 1"),
        ({"data": "/no/such/place"}, "/no/such/place: no such file or directory"),
        ({"tasks": "s-vision-speech/ai2d", "data": None}, "the hub has no such rows; name yours with --data"),
    ],
)
def test_wrong_arguments(sets, tmp_path, arguments, message):
    """Before a model is loaded: there is none of this name."""
    with pytest.raises(EvaluationError, match=message):
        evaluate(**({"tasks": "nano/text", "model": "/no/model", "data": sets, "out": tmp_path} | arguments))


def test_settings_of_a_loaded_model_are_not_ignored(nano, sets, tmp_path):
    with pytest.raises(EvaluationError, match="quantize: only for a model by name"):
        evaluate("nano/text", nano, data=sets, out=tmp_path, quantize="int8")


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ASKED = {"prompt": "2 + 3 =", "answers": ["5"], "metric": "exact"}


def test_tasks_of_one_name_are_refused(nano, tmp_path):
    first, second = write(tmp_path / "a" / "rows.jsonl", ASKED), write(tmp_path / "b" / "rows.jsonl", ASKED, ASKED)
    with pytest.raises(EvaluationError, match="rows: the name of two tasks, of .*/a/rows.jsonl and of .*/b/rows.jsonl"):
        evaluate([first, second], nano, out=tmp_path / "out", progress=False)
    [found] = evaluate([second, second], nano, out=tmp_path / "out", progress=False)
    assert found.counts.items == 2


def test_a_dataset_without_the_media_is_not_asked_without(nano, tmp_path):
    rows = write(tmp_path / "rows.jsonl", {"question": "2 + 3 =", "answers": ["5"]})
    with pytest.raises(EvaluationError, match="docvqa: row 0 has none of the columns image"):
        evaluate("docvqa", nano, data=rows, out=tmp_path, progress=False)


def test_odd_rows_end_nothing(nano, tmp_path):
    votes = {"prompt": "2 + 3 =", "answers": ["5", "5"], "metric": "vqa"}
    odd = [{**votes, "prompt": None}, {**votes, "answers": ["5"]}, {**votes, "prompt": "\ud800"}]
    rows = write(tmp_path / "rows.jsonl", votes, *odd, votes)
    for _ in range(2):
        [found] = evaluate(rows, nano, out=tmp_path / "out", progress=False)
        assert (found.counts.items, found.counts.answered) == (5, 2)
        items = answered(tmp_path / "out", "rows")
        assert "no column 'prompt'" in items["1"]["error"] and "several people" in items["2"]["error"]
        assert items["3"]["error"]


def test_what_shards_left_is_no_part_of_a_whole_run(nano, tmp_path):
    rows = write(tmp_path / "rows.jsonl", ASKED, ASKED)
    evaluate(rows, nano, out=tmp_path / "out", shard="1/2", progress=False)
    [found] = evaluate(rows, nano, out=tmp_path / "out", progress=False)
    assert (found.counts.items, found.shards) == (2, "")


def test_merging_rows_that_are_called_like_a_known_task(nano, tmp_path):
    rows = write(tmp_path / "docvqa.jsonl", ASKED)
    evaluate(rows, nano, out=tmp_path / "1", shard="1/1", progress=False)
    [merged] = merge([tmp_path / "1"], tmp_path / "all")
    assert (merged.metric_name, merged.published) == ("exact", None)


def test_what_has_no_room(nano, tmp_path, monkeypatch):
    """An item that is too large is its own fault if others have room, and that of the machine if none has."""
    rows = write(tmp_path / "rows.jsonl", {**ASKED, "prompt": "2 + " * 300 + "3 ="}, ASKED)
    monkeypatch.setattr("phi4mm_jax.service.available_memory", lambda device: 1000)
    with pytest.raises(MemoryPlanError, match="0.0 left"):
        evaluate(rows, nano, out=tmp_path / "out", progress=False)
    assert not answered(tmp_path / "out", "rows")
    plan = plan_memory(nano.steps, 1, 1024)
    enough = plan.total - plan.weights
    monkeypatch.setattr("phi4mm_jax.service.available_memory", lambda device: enough)
    [found] = evaluate(rows, nano, out=tmp_path / "out", progress=False)
    items = answered(tmp_path / "out", "rows")
    assert "GiB are needed" in items["0"]["error"] and not items["1"]["error"]
    assert (found.counts.answered, found.counts.errors) == (1, 1)


def test_features_of_what_is_asked_are_bounded(whole, nano, sets, tmp_path, monkeypatch):
    out, _ = whole
    asked = []
    submit = Service.submit
    monkeypatch.setattr(Service, "submit", lambda self, requests: (asked.append(len(requests)), submit(self, requests)))
    monkeypatch.setattr("phi4mm_jax.evaluation.session._MOST_BYTES", 1)
    evaluate("nano/reading", nano, data=sets, out=tmp_path, progress=False)
    assert answered(tmp_path, "nano/reading") == answered(out, "nano/reading")
    assert set(asked) == {1}


def program(sets, out, *more):
    return [sys.executable, "-m", "phi4mm_jax.cli", "eval", "nano/text", "nano/asr", "nano/reading", "--model", "nano",
            "--dtype", "float32", "--quiet", "--data", str(sets), "--out", str(out), *more]  # fmt: skip


def kill_and_go_on(sets, out, times, draw):
    """Kills the program so many times, each at some moment after it has begun to answer, then lets it end."""
    environment = os.environ | {"XLA_FLAGS": ""}
    killed = 0
    while killed < times:
        process = subprocess.Popen(program(sets, out), env=environment, stdout=subprocess.DEVNULL)
        begun = sum(path.stat().st_size for path in out.glob("*/items-*"))
        while process.poll() is None and sum(path.stat().st_size for path in out.glob("*/items-*")) == begun:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            return killed
        killed += 1
    subprocess.run(program(sets, out), env=environment, stdout=subprocess.DEVNULL, check=True)
    return killed


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_an_undisturbed_run(whole, sets, tmp_path, times):
    out, results = whole
    assert kill_and_go_on(sets, tmp_path, times, random.Random(times)) >= 1
    for name in ("nano/text", "nano/asr", "nano/reading"):
        assert answered(tmp_path, name) == answered(out, name)
        saved, expected = (
            json.loads((path / name.replace("/", "__") / "results.json").read_text()) for path in (tmp_path, out)
        )
        assert without_the_run(saved) == without_the_run(expected)


ONE_PROCESS = """
import sys, jax
number, port, data, out = sys.argv[1:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
from phi4mm_jax.evaluation import evaluate
[found] = evaluate("nano/reading", "nano", data=data, out=out, dtype="float32", progress=False)
print(found.score, found.counts.items)
"""


@pytest.mark.slow
def test_processes_share_the_work(whole, sets, tmp_path):
    out, results = whole
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = [port, str(sets), str(tmp_path)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_PROCESS, str(number), *arguments],
            env=os.environ | {"XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=300)[0].splitlines()[-1] for process in processes]
    expected = results["nano/reading"]
    assert said == [f"{expected.score} {expected.counts.items}"] * 2
    assert answered(tmp_path, "nano/reading") == answered(out, "nano/reading")
    assert sorted(path.name for path in tmp_path.glob("*/items-*")) == ["items-1-of-2.jsonl", "items-2-of-2.jsonl"]
    assert (tmp_path / "report.html").is_file()
