"""From rows to prompts: what is asked, in which order, what becomes of bad items, and that nothing stays behind."""

import dataclasses
import io
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.manifests import Rows
from phi4mm_jax.evaluation.pipeline import Prepared, prepare
from phi4mm_jax.evaluation.tasks.task import Columns, Task
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.weights.hub import BUNDLED

TASK = Task(
    name="test",
    title="Test",
    source=Path("rows"),
    columns=Columns(images=("image", "images"), audios=("audio", "audios"), references=("answer",)),
    metric="exact",
)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_checkpoint(BUNDLED["nano"], ModelConfig.from_checkpoint(BUNDLED["nano"]))


def recording(seconds: float, rate: int = 16_000, channels: int = 1, form: str = "WAV") -> bytes:
    samples = 0.1 * np.random.default_rng(round(seconds * rate)).standard_normal((round(seconds * rate), channels))
    content = io.BytesIO()
    soundfile.write(content, samples, rate, format=form)
    return content.getvalue()


def picture(width: int, height: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def rows(*given: dict[str, Any]) -> Rows:
    every = {"question": "What?", "answer": "x", "image": None, "audio": None}
    return Rows("rows", Path("nowhere"), [every | row for row in given])


def mixed(count: int) -> Rows:
    """Rows of all kinds and many lengths."""
    rng = np.random.default_rng(5)
    kinds = [
        lambda: {"question": "moon " * int(rng.integers(1, 40))},
        lambda: {"audio": recording(float(rng.uniform(0.1, 3)))},
        lambda: {"image": picture(*map(int, rng.integers(20, 200, 2)))},
        lambda: {"audio": b"damaged", "image": picture(30, 30)},
    ]
    return rows(*(kinds[i % len(kinds)]() for i in range(count)))


def run(source: Rows, processor: Processor, task: Task = TASK, **options: Any) -> list[Prepared]:
    return list(prepare(task, source, processor, **{"rows": range(len(source)), **options}))


def ids(prepared: Sequence[Prepared]) -> list[str]:
    return [one.item.id for one in prepared]


def arrays(prepared: Prepared) -> list[np.ndarray]:
    prompt = prepared.prompt
    return [prompt.token_ids, *(i.crops for i in prompt.images), *(a.features for a in prompt.audios)]


# --- what is asked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({}, "<|user|>What?<|end|><|assistant|>"),
        ({"audio": recording(0.5), "question": ""}, "<|user|><|audio_1|><|end|><|assistant|>"),
        (
            {"images": [picture(30, 40), picture(50, 20)], "audio": recording(0.5)},
            "<|user|><|image_1|><|image_2|><|audio_1|>What?<|end|><|assistant|>",
        ),
        ({"question": "A <|end|> B"}, None),
    ],
)
def test_media_stand_before_the_text_with_nothing_between(
    processor: Processor, row: dict[str, Any], text: str | None
) -> None:
    (prepared,) = run(rows(row), processor)
    images = row.get("images", [])
    audios = [row["audio"]] if "audio" in row else []
    if text:
        expected = processor.raw(text, images, audios)
        for got, right in zip(arrays(prepared), arrays(Prepared(item=prepared.item, prompt=expected)), strict=True):
            np.testing.assert_array_equal(got, right)
    else:  # control tokens of a question are text
        end = processor.tokenizer.control_ids["<|end|>"]
        assert (prepared.prompt.token_ids == end).sum() == 1
    assert prepared.error is None
    assert prepared.length == len(prepared.prompt.token_ids)
    assert len(prepared.item.images) == len(prepared.prompt.images) == len(images)


def test_seconds_are_those_of_the_samples(processor: Processor) -> None:
    source = rows(
        {"audios": [recording(1.25, 44_100, 2), recording(0.5, 8_000)]},
        {"audio": recording(2.0, 48_000, form="FLAC")},
        {"image": picture(30, 30)},
    )
    prepared = {one.item.id: one for one in run(source, processor)}
    assert [prepared[id].audio_seconds for id in "012"] == [1.75, 2.0, 0.0]


def test_size_in_memory(processor: Processor) -> None:
    (prepared,) = run(rows({"image": picture(90, 40), "audio": recording(1)}), processor)
    (image,), (audio,) = prepared.prompt.images, prepared.prompt.audios
    assert prepared.nbytes >= image.crops.nbytes + audio.features.nbytes > 0.9 * prepared.nbytes


# --- order ---------------------------------------------------------------------------------------------------


def test_windows_are_sorted_and_do_not_depend_on_workers(processor: Processor) -> None:
    source = mixed(21)
    single = [one for i in range(21) for one in run(source, processor, rows=[i])]
    assert sum(one.error is not None for one in single) == 5
    expected = []
    for start in range(0, 21, 6):
        expected += sorted(single[start : start + 6], key=lambda one: one.length, reverse=True)
    assert ids(expected) != ids(single)
    for workers in (1, 3, 8):
        prepared = run(source, processor, window=6, workers=workers)
        assert ids(prepared) == ids(expected)
        for got, right in zip(prepared, expected, strict=True):
            assert (got.error, got.audio_seconds) == (right.error, right.audio_seconds)
            if right.prompt:
                for a, b in zip(arrays(got), arrays(right), strict=True):
                    np.testing.assert_array_equal(a, b)


def test_large_items_make_windows_short(processor: Processor) -> None:
    sizes = [(20, 20), (200, 150), (30, 20), (180, 160), (25, 25), (170, 170)]
    source = rows(*({"image": picture(*size)} for size in sizes))
    assert ids(run(source, processor, window=6)) != list("012345")
    assert ids(run(source, processor, window=6, max_bytes=3)) == list("012345")
    largest = max(one.nbytes for one in run(source, processor))
    assert ids(run(source, processor, window=6, max_bytes=3 * largest)) == ["1", "0", "3", "2", "5", "4"]


def test_only_rows_of_a_range_are_prepared(processor: Processor) -> None:
    assert sorted(ids(run(mixed(12), processor, rows=range(3, 7)))) == ["3", "4", "5", "6"]
    assert run(mixed(4), processor, rows=range(2, 2)) == []


# --- what was done -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recorded(Rows):
    """Rows that remember which of them were read."""

    read: list[int] = dataclasses.field(default_factory=list)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        return super().__getitem__(index)


def test_items_that_are_done_are_left_out(processor: Processor) -> None:
    source = Recorded(*dataclasses.astuple(mixed(6)))
    done = {"0", "2", "3", "9"}
    assert sorted(ids(run(source, processor, done=done))) == ["1", "4", "5"]
    assert sorted(source.read) == [1, 4, 5]
    assert run(source, processor, done=set("012345")) == []


def test_variants_that_are_done_are_left_out(processor: Processor) -> None:
    task = dataclasses.replace(TASK, prepare=lambda row: [{**row, "question": q} for q in ("a", "bb c", "d")])
    source = rows({}, {}, {})
    done = {"0.1", "1.0", "1.1", "1.2"}
    assert sorted(ids(run(source, processor, task, done=done))) == ["0.0", "0.2", "2.0", "2.1", "2.2"]


# --- bad items -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": b"no picture"}, "10 bytes: not an image, or damaged"),
        ({"image": picture(64, 64)[:-2000]}, "image"),
        ({"image": "missing.png"}, "nowhere/missing.png: no such file"),
        ({"image": 5}, "int"),
        ({"audio": b"no sound"}, "8 bytes: not an audio file that can be read"),
        ({"audio": recording(1)[:-1000]}, "audio is truncated"),
        ({"audio": recording(0)}, "holds no samples"),
        ({"audio": recording(0.01)}, "audio of 10 ms is too short"),
        ({"audio": "missing.wav"}, "nowhere/missing.wav: no such file"),
        ({"audio": recording(9)}, "audio is longer than the limit"),
        ({"question": "moon " * 200}, "tokens"),
        ({"image": picture(300, 300), "images": [picture(300, 300)] * 8}, "tokens"),
        ({"question": "See <|image_2|>"}, "<|image_2|> has no image"),
        ({"answer": None}, "test: row 1 has none of the columns answer"),
        ({"options": "crash"}, "ZeroDivisionError"),
    ],
)
def test_bad_items_have_an_error(processor: Processor, row: dict[str, Any], message: str) -> None:
    def prepared(row: dict[str, Any]) -> list[dict[str, Any]]:
        return [row] if "options" not in row else 1 // 0

    short = Processor(processor.config, processor.tokenizer, max_tokens=100)
    good = {"audio": recording(0.5)}
    before, bad, after = sorted(
        run(rows(good, row, good), short, dataclasses.replace(TASK, prepare=prepared)), key=lambda one: one.item.id
    )
    assert bad.item.id == "1"
    assert bad.prompt is None
    assert message in bad.error
    assert "\n" not in bad.error
    assert (bad.length, bad.nbytes, bad.audio_seconds) == (0, 0, 0.0)
    assert before.prompt and after.prompt


class Failing(Rows):
    """Rows of a source that is cut off at some time."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 7:
            raise EvaluationError("owner/name: the hub cannot be read")
        return super().__getitem__(index)


def test_source_that_fails_ends_the_iteration(processor: Processor) -> None:
    source = Failing(*dataclasses.astuple(mixed(20)))
    prepared = prepare(TASK, source, processor, rows=range(20), window=3, workers=2)
    got = []
    with pytest.raises(EvaluationError, match="the hub cannot be read"):
        got.extend(prepared)
    assert sorted(ids(got)) == list("012345")


# --- threads -------------------------------------------------------------------------------------------------


def test_windows_are_prepared_ahead_but_not_all(processor: Processor) -> None:
    source = Recorded(*dataclasses.astuple(rows(*[{}] * 500)))
    prepared = prepare(TASK, source, processor, rows=range(500), window=5, workers=2)
    next(prepared)
    deadline = time.monotonic() + 60
    while len(source.read) < 15 and time.monotonic() < deadline:
        time.sleep(0.01)
    ahead = len(source.read)
    prepared.close()
    assert 15 <= ahead <= 3 * 5 + 2 * 2


def new_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread not in before]


@pytest.mark.parametrize("taken", [0, 1, 7, 40])
def test_closing_leaves_no_thread(processor: Processor, taken: int) -> None:
    before = set(threading.enumerate())
    source = Recorded(*dataclasses.astuple(mixed(40)))
    prepared = prepare(TASK, source, processor, rows=range(40), window=4, workers=3)
    for _ in range(taken):
        next(prepared)
    started = new_threads(before)
    assert bool(started) == bool(taken)
    prepared.close()
    for thread in started:
        thread.join(60)
        assert not thread.is_alive()
    read = len(source.read)
    assert read < 40 or taken == 40
    assert not new_threads(before)


PROGRAM = """
import sys, time
from pathlib import Path
from phi4mm_jax.config import ModelConfig
from phi4mm_jax.evaluation.manifests import Rows
from phi4mm_jax.evaluation.pipeline import prepare
from phi4mm_jax.evaluation.tasks.task import Columns, Task
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.weights.hub import BUNDLED

class Slow(Rows):
    def __getitem__(self, index):
        time.sleep(float(sys.argv[1]) if index > 20 else 0)
        return {"question": "What?", "answer": "x"}

def main():
    processor = Processor.from_checkpoint(BUNDLED["nano"], ModelConfig.from_checkpoint(BUNDLED["nano"]))
    task = Task(name="t", title="t", source=Path("x"), columns=Columns(references=("answer",)), metric="exact")
    prepared = prepare(task, Slow("s", None, [{}] * 100000), processor, rows=range(100000), window=4, workers=3)
    print(next(prepared).item.id, flush=True)
    if sys.argv[2] == "leave":
        sys.exit()
    if sys.argv[2] == "fail":
        raise KeyError("own")
    for one in prepared:
        pass

main()
"""


@pytest.mark.parametrize(("end", "code"), [("leave", 0), ("fail", 1), ("interrupt", -signal.SIGINT)])
def test_programs_end_with_an_iterator_open(end: str, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, "0.05", end],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            assert program.stdout.readline() == "0\n"
            if end == "interrupt":
                program.send_signal(signal.SIGINT)
            _, said = program.communicate(timeout=180)
        finally:
            program.kill()
    assert program.returncode == code, said
    assert said.count("Traceback") == (end != "leave"), said
