"""The report: all of it is in one file, whatever is in the answers."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from phi4mm_jax.evaluation import report
from phi4mm_jax.evaluation.differences import differences
from phi4mm_jax.evaluation.items import Answered, EvaluationError, Item
from phi4mm_jax.evaluation.metrics.metric import Metric
from phi4mm_jax.evaluation.previews import Previews
from phi4mm_jax.evaluation.results import score_suite, score_task
from phi4mm_jax.evaluation.shards import Shard
from phi4mm_jax.evaluation.speed import SESSION
from phi4mm_jax.evaluation.tasks.task import Published, Task

SCRIPT = "<script>alert(1)</script>"
VOID = {"meta", "img", "br", "rect", "line", "circle"}


def metric(name, lower_is_better=False):
    return Metric(
        name=name,
        title=name,
        lower_is_better=lower_is_better,
        measure=lambda prediction, references, facts: ((prediction in references) != lower_is_better, 1),
        score=lambda sums: 100 * sums[..., 0] / sums[..., 1],
    )


def results(predictions, kind=None, published=None, seconds=2.0, task="set", **fields):
    """Results of a task whose right answers are all "a b c"."""
    kind = kind or metric("right")
    task = Task(name=task, title="A Set", source=Path("x"), metric=kind.name, published=published)
    fields = {"prompt": "?", "references": ("a b c",), "facts": {}, "session": "s", **fields}
    records = [Answered(id=str(i), name=f"item-{i}", prediction=p, **fields) for i, p in enumerate(predictions)]
    measured = {"session": "s", "rows": 16, **dict.fromkeys(SESSION, 1), "seconds": seconds}
    shard = Shard(
        directory=Path("out"),
        dataset="d",
        settings={"batch": 8},
        versions={"jax": "1"},
        hardware={"devices": 1, "kind": "TPU v5e", "processor": "P", "cores": 8, "memory": 2**34},
        answered=records,
        sessions=[measured],
    )
    return score_task(task, kind, [shard])


class Page(HTMLParser):
    """A page: its elements with attributes, and its text; checks that all elements are closed."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.words, self.open = [], [], []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attributes for found, attributes in self.elements if found == tag]


@pytest.fixture
def write(tmp_path):
    def write(*shown, media_of=lambda task, id: None):
        report.write_report(tmp_path / "report.html", shown, media_of, "The <model>")
        return Page(tmp_path / "report.html")

    return write


def picture(size=(1200, 800), noise=False):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8) if noise else np.full(size[::-1], 9)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def sound(seconds, rate=44_100):
    return (0.3 * np.sin(np.arange(int(seconds * rate)) * 0.05)).astype(np.float32), rate


# --- what it shows -------------------------------------------------------------------------------------------


def test_page(write):
    published = Published(score=60.0, source="them")
    task = results(["a b c"] * 8 + ["x y"] * 2, published=published)
    page = write(task, score_suite("suite", "The Suite", [task], published=published))
    assert "The <model>" in page.text
    for shown in ("The Suite", "A Set", "80.00", "60.00", "+20.00", "worst 2 of 2", "x y", "TPU v5e", "batch 8"):
        assert shown in page.text
    for link in page.all("a"):
        assert link["href"][1:] in [section.get("id") for section in page.all("section")]


def test_a_suite_stands_before_its_tasks():
    tasks = [results(["x"], task=name) for name in "pqr"]
    suite = score_suite("suite", "The Suite", [tasks[2], tasks[0]])
    assert [result.name for result in report._suites_first([*tasks, suite])] == ["q", "suite", "r", "p"]


def test_answers_are_sorted_from_the_worst(write):
    page = write(results(["a b c", "x1", "a b c", "x2"], error=None))
    assert "worst 2 of 2" in page.text
    assert page.text.count("item-") == 2 and {"item-1", "item-3"} <= set(page.text.replace(",", " ").split())


def test_verdict_needs_the_whole_interval_on_one_side(write):
    def verdict(score, kind):
        classes = [
            d.get("class", "") for d in write(results(answers, kind, Published(score=score, source="t"))).all("dd")
        ]
        return [c for c in classes if c in ("within", "better", "worse")]

    answers = ["a b c"] * 80 + ["x"] * 20
    assert verdict(80.0, metric("right")) == verdict(82.0, metric("right")) == ["within"]
    assert verdict(60.0, metric("right")) == ["better"] and verdict(99.0, metric("right")) == ["worse"]
    assert verdict(1.0, metric("wrong", lower_is_better=True)) == ["worse"]
    assert verdict(60.0, metric("wrong", lower_is_better=True)) == ["better"]


def test_histogram_counts_every_item():
    scores = [0, 0, 0.5, 9.9, 10, 55, 99.9, 100, 100, 250]
    bars = report._histogram(scores)
    assert dict(bars) == {
        **{"0": 2, "<10": 2, "<20": 1, "<30": 0, "<40": 0, "<50": 0, "<60": 1, "<70": 0, "<80": 0, "<90": 0},
        **{"<100": 1, "100": 2, ">100": 1},
    }
    assert report._histogram([100])[-1] == ("100", 1)
    assert sum(count for _, count in report._histogram([])) == 0


def test_edits_of_a_transcript(write):
    assert [(s.kind, s.text) for s in differences("The cat sat, down", "the dog sat down now.")] == [
        *[("equal", "The"), ("missing", "cat"), ("added", "dog"), ("equal", "sat, down"), ("added", "now.")]
    ]
    assert [(s.kind, s.text) for s in differences("今日は。", "今朝は", by_characters=True)] == [
        *[("equal", "今"), ("missing", "日"), ("added", "朝"), ("equal", "は")]
    ]
    assert differences("", "") == []
    page = write(results(["a d c"], metric("wer:de", lower_is_better=True)))
    assert len(page.all("del")) == len(page.all("ins")) == 2  # the legend, and the edits
    assert "a b d c" in page.text
    assert not write(results(["a d c"])).all("del")


def test_failed_items(write):
    page = write(results([""] * 60, error="a.png: no such <file>"))
    assert "60 failed" in page.text and page.text.count("a.png: no such <file>") == 50
    assert "and 10 more" in page.text


@pytest.mark.parametrize("predictions", [[], ["a b c"]])
def test_nothing_to_show(write, predictions):
    page = write(results(predictions, seconds=0.0, published=Published(score=100.0, source="t")))
    assert "A Set" in page.text
    assert not page.all("article")


# --- nothing but the page ------------------------------------------------------------------------------------


def test_text_of_strangers_stays_text(write):
    everywhere = {"prompt": SCRIPT, "references": (SCRIPT,), "facts": {"subset": SCRIPT}}
    failed = results([""], task="failed", error=SCRIPT, **everywhere)
    wrong = results([SCRIPT + "!"], **everywhere)
    page = write(wrong, failed, score_suite("suite", SCRIPT, [wrong, failed], note=SCRIPT))
    assert not page.all("script")
    assert page.text.count(SCRIPT) == 8
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "script" not in policy


def test_page_asks_for_nothing(write):
    item = Item(id="0", name="0", images=(picture(),), audios=(sound(1),))
    page = write(results(["x", "y"]), media_of=lambda task, id: item)
    loaded = [a[name] for _, a in page.elements for name in ("src", "href", "srcset", "data", "poster") if name in a]
    assert len(loaded) == 4
    assert all(url.startswith(("data:image/webp;base64,", "data:audio/mpeg;base64,")) for url in loaded)
    assert not page.all("link") and not re.search(r"@import|url\(", page.source)


def test_lone_surrogates_do_not_prevent_the_page(write):
    assert "x?y" in write(results(["x\ud800y"])).text


# --- media ---------------------------------------------------------------------------------------------------


def decode(preview):
    import base64

    return io.BytesIO(base64.b64decode(preview.url.partition(",")[2]))


def test_previews_are_small_copies():
    image, audio, long = Previews(10**7).of(Item(id="0", name="", images=(picture(),), audios=(sound(2), sound(40))))
    assert Image.open(decode(image)).size == (900, 600) and image.note == "1200 × 800 pixels"
    samples, rate = soundfile.read(decode(audio))
    assert rate == 16_000 and len(samples) / rate == pytest.approx(2, abs=0.2) and audio.note == "2.0 s"
    samples, rate = soundfile.read(decode(long))
    assert len(samples) / rate == pytest.approx(30, abs=0.2) and long.note == "the first 30 s of 40.0 s"
    assert len(long.url) < 200_000


def test_unreadable_media_say_why(write, tmp_path):
    item = Item(id="0", name="", images=(b"junk", tmp_path / "gone.png"), audios=(b"junk",))
    page = write(results(["x"]), media_of=lambda task, id: item)
    assert not page.all("img") and not page.all("audio")
    assert "not an image" in page.text and "no such file" in page.text and "not an audio file" in page.text


def test_media_that_cannot_be_had(write):
    def gone(task, id):
        raise EvaluationError(f"{task}: no row {id}")

    assert "set: no row 0" in write(results(["x"]), media_of=gone).text


def test_size_is_bounded(write, monkeypatch):
    monkeypatch.setattr(report, "_MEDIA_BYTES", 400_000)
    item = Item(id="0", name="", images=(picture((300, 300), noise=True),))
    hostile = results(["<&'\" " * 100_000] * 30, metric("cer", lower_is_better=True), references=("x" * 10**6,) * 9)
    many = [results(["x"], task=str(n)) for n in range(3)]
    page = write(hostile, *many, media_of=lambda task, id: item)
    urls = sum(len(image["src"]) for image in page.all("img"))
    assert 100_000 < urls <= 400_000
    assert "to keep this page small" in page.text
    assert len(page.source) - urls < 1_000_000
    assert len(page.all("article")) == 20 + 3
    assert "and 4 more" in page.text


def test_many_tasks_share_the_page(write):
    page = write(*[results(["x"] * 30, task=str(n)) for n in range(40)])
    assert len(page.all("article")) == 200
