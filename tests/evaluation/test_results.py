"""Scores, intervals, counts and speed of answers, and which shards belong together."""

import dataclasses
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from phi4mm_jax.evaluation import environment
from phi4mm_jax.evaluation.items import Answered, EvaluationError
from phi4mm_jax.evaluation.metrics.metric import Metric
from phi4mm_jax.evaluation.results import Results, replace_text, score_suite, score_task
from phi4mm_jax.evaluation.shards import Shard, check_shards
from phi4mm_jax.evaluation.speed import SESSION
from phi4mm_jax.evaluation.statistics import RESAMPLES, estimate, mean
from phi4mm_jax.evaluation.tables import markdown
from phi4mm_jax.evaluation.tasks.task import Published, Task


def ratio(sums):
    return 100 * sums[..., 0] / sums[..., 1]


RIGHT = Metric(
    name="right",
    title="accuracy",
    measure=lambda prediction, references, facts: (prediction in references, 1) if references else (),
    score=ratio,
)
ERRORS = Metric(
    name="wer",
    title="error rate",
    lower_is_better=True,
    settings={"library": "1.0"},
    measure=lambda prediction, references, facts: (
        sum(a != b for a, b in zip(prediction.ljust(len(references[0])), references[0], strict=False)),
        len(references[0]),
    ),
    score=ratio,
)
TASK = Task(
    name="set",
    title="A Set",
    source=Path("x"),
    metric="right",
    published=Published(score=70.0, source="them"),
    note="N",
)
MACHINE = {"devices": 4, "kind": "TPU v5e", "processor": "P", "cores": 8, "memory": 2**34}


def answer(id, prediction="a", references=("a",), **fields):
    fields = {"name": f"n{id}", "prompt": "?", "facts": {}, "finish_reason": "stop", "session": "s", **fields}
    return Answered(id=str(id), prediction=prediction, references=references, **fields)


def shard(answered, sessions=(), **fields):
    fields = {"directory": Path("out"), "dataset": "d", "settings": {"batch": 8}, "versions": {"jax": "1"}, **fields}
    return Shard(answered=answered, sessions=sessions, hardware=MACHINE, **fields)


def session(name, **numbers):
    return {"session": name, "rows": 16, **dict.fromkeys(SESSION, 0), **numbers}


def score(answered, metric=RIGHT, task=TASK):
    return score_task(task, metric, [shard(answered)])


# --- scores --------------------------------------------------------------------------------------------------


def test_counts_and_score():
    results = score(
        [
            answer(0),
            answer(1, "b"),
            answer(2, "a", error="no such file"),
            answer(3, "b", left_out="ignored"),
            answer(4, "b", references=()),
            answer(5, "a", finish_reason="length"),
        ]
    )
    assert results.score == 50.0  # of 0, 1, 2 and 5; the prediction of 2 does not count
    assert dataclasses.asdict(results.counts) == {"items": 6, "answered": 3, "errors": 1, "left_out": 2, "cut": 1}
    assert [record.score for record in results.answered] == [100.0, 0.0, 0.0, None, None, 100.0]
    assert results.answered[4].left_out
    assert results.difference == -20.0
    assert results.estimate.units == 4


def test_corpus_score_is_of_sums_and_not_a_mean():
    results = score([answer(0, "abcdefgx", ("abcdefgh",)), answer(1, "x", ("a",))], ERRORS)
    assert results.score == pytest.approx(100 * 2 / 9)
    assert [record.score for record in results.answered] == [12.5, 100.0]


def test_ids_are_ordered_by_their_numbers():
    ids = ["10", "9.10", "9.2", "b", "9"]
    assert [record.id for record in score([answer(id) for id in ids]).answered] == ["9", "9.2", "9.10", "10", "b"]


def test_a_group_is_right_only_together():
    answers = [
        answer(f"{i}.{j}", "b" if (i, j) == (1, 2) else "a", facts={"group": i}) for i in (0, 1) for j in range(3)
    ]
    results = score([*answers, answer(2, "b"), answer(3), answer(4, facts={"group": 1}, left_out="so")])
    assert results.score == 50.0  # groups 0 (right) and 1 (not), items 2 (not) and 3 (right)
    assert results.estimate.units == 4
    assert results.counts.items == 9


def test_other_metrics_beside_the_score():
    """Of a group all items count there, and only those that the other metric measures."""
    metric = dataclasses.replace(RIGHT, extras=(dataclasses.replace(ERRORS, name="letters"),))
    answers = [answer(f"{i}.{j}", "ab"[j], facts={"group": i}) for i in range(4) for j in range(2)]
    results = score([*answers, answer(4, "b", left_out="so")], metric)
    assert results.score == 0.0
    (extra,) = results.extras
    assert (extra.estimate.score, extra.estimate.units) == (50.0, 4)
    assert extra.estimate.low == extra.estimate.high == 50.0  # each group has one error
    assert results.summary()["extras"]["letters"]["score"] == 50.0
    nothing = dataclasses.replace(RIGHT, extras=(dataclasses.replace(RIGHT, measure=lambda *_: ()),))
    assert score(answers, nothing).extras[0].estimate.score is None


def test_subsets():
    subsets = {"x": "aab", "y": "abbb"}
    answers = [answer(f"{s}.{i}", p, facts={"subset": s}) for s, text in subsets.items() for i, p in enumerate(text)]
    results = score([*answers, answer(0)])
    assert list(results.subsets) == ["x", "y"]
    assert results.subsets["x"].score == pytest.approx(200 / 3)
    assert results.subsets["y"].score == 25.0
    assert results.subsets["y"].units == 4
    assert results.score == 50.0


def test_length_is_of_audio_if_there_is_any_and_else_of_the_prompt():
    heard = score([answer(i, "a" if i < 6 else "b", audio_seconds=float(i), prompt_tokens=9) for i in range(12)])
    assert heard.length == "seconds of audio"
    assert [(c.low, c.high) for c in heard.lengths] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]
    assert [c.estimate.score for c in heard.lengths] == [100, 100, 100, 0, 0, 0]
    read = score([answer(i, prompt_tokens=7) for i in range(12)])
    assert read.length == "tokens of the prompt"
    assert [(c.low, c.high, c.estimate.units) for c in read.lengths] == [(7, 7, 12)]


@pytest.mark.parametrize("answers", [[], [answer(0, references=())]])
def test_nothing_to_score(answers, tmp_path):
    results = score(answers)
    assert results.score is None and results.difference is None and results.estimate.low is None
    results.save(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["score"] is None
    assert "| – | 70.00 (them) | – |" in markdown([results])


# --- the bootstrap -------------------------------------------------------------------------------------------


def test_bootstrap_is_that_of_the_textbook():
    random = np.random.default_rng(1)
    numbers = np.stack([random.integers(0, 9, 40), random.integers(5, 30, 40)], axis=1).astype(float)
    found = estimate(ERRORS, numbers, "set/x")
    draws = np.random.default_rng([2503, *b"set/x"])
    scores = []
    for _ in range(RESAMPLES):
        drawn = [numbers[i] for i in draws.integers(40, size=40)]
        scores.append(100 * sum(n[0] for n in drawn) / sum(n[1] for n in drawn))
    np.testing.assert_allclose(found.resampled, scores, rtol=1e-12)
    scores.sort()
    # A percentile lies between the two draws around rank q (n - 1).
    assert scores[24] <= found.low <= scores[25]
    assert scores[974] <= found.high <= scores[975]
    assert found.score == pytest.approx(100 * numbers[:, 0].sum() / numbers[:, 1].sum())


def test_intervals_hold_the_true_score_as_often_as_they_say():
    random = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        numbers = np.stack([random.random(150) < 0.7, np.ones(150)], axis=1).astype(float)
        found = estimate(RIGHT, numbers, "set")
        held += found.low <= 70 <= found.high
    # 95 % of 200 is 190 with a standard deviation of 3.1; the percentile method loses about one more in a hundred.
    assert 180 <= held <= 198


def test_bootstrap_draws_groups_as_a_whole():
    """Ten copies of each item in one group say no more than the item."""
    once = score([answer(i, "ab"[i % 2]) for i in range(20)])
    copies = score([answer(f"{i}.{j}", "ab"[i % 2], facts={"group": i}) for i in range(20) for j in range(10)])
    assert (copies.estimate.low, copies.estimate.high) == (once.estimate.low, once.estimate.high)
    alone = score([answer(f"{i}.{j}", "ab"[i % 2]) for i in range(20) for j in range(10)])
    assert alone.estimate.high - alone.estimate.low < 0.5 * (once.estimate.high - once.estimate.low)


# --- suites --------------------------------------------------------------------------------------------------


def parts(scores):
    """Results of tasks of 1000 items with these percentages."""
    return [
        score(
            [answer(i, "a" if i < 10 * s else "b") for i in range(1000)],
            task=dataclasses.replace(TASK, name=f"set/{s}"),
        )
        for s in scores
    ]


def test_a_suite_is_the_unweighted_mean_of_its_tasks():
    small = score([answer(0), answer(1, "b")], task=dataclasses.replace(TASK, name="set/small"))
    results = score_suite("set", "All Sets", [*parts([90]), small], published=Published(score=75.0, source="them"))
    assert results.score == 70.0
    assert results.difference == -5.0
    assert results.parts == ["set/90", "set/small"]
    assert results.counts.items == 1002
    assert results.metric == "mean accuracy"
    assert {name: part.score for name, part in results.subsets.items()} == {"set/90": 90.0, "set/small": 50.0}


def test_a_suite_may_round_first():
    thirds = [score([answer(i, "aab"[i]) for i in range(3)], task=dataclasses.replace(TASK, name=n)) for n in "pq"]
    assert score_suite("set", "S", thirds, digits=0).score == 67.0
    assert score_suite("set", "S", thirds).score == pytest.approx(200 / 3)


def test_the_interval_of_a_suite_is_that_of_independent_tasks():
    estimates = [part.estimate for part in parts([30, 50, 70])]
    found = mean(estimates)
    deviation = math.sqrt(sum(e.resampled.var() for e in estimates)) / 3
    assert found.resampled.std() == pytest.approx(deviation, rel=0.1)
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_a_suite_without_a_score_of_one_task_has_none():
    assert score_suite("set", "S", [*parts([90]), score([])]).score is None


def test_a_suite_of_errors_and_hits_is_refused():
    with pytest.raises(EvaluationError, match="set: no mean"):
        score_suite("set", "S", [score([answer(0)]), score([answer(0)], ERRORS)])


# --- speed ---------------------------------------------------------------------------------------------------

MEASURED = {
    **{"seconds": 10.0, "loading_seconds": 3.0, "warm_up_seconds": 4.0},
    **{"encode_seconds": 1.0, "prefill_seconds": 2.0, "decode_seconds": 5.0},
    **{"prefill_tokens": 80, "prefill_computed": 100, "decode_tokens": 30, "decode_computed": 40},
    **{"audio_frames": 90, "audio_frames_computed": 120},
}


def test_speed():
    first = [answer(i, audio_seconds=6.0, completion_tokens=3, elapsed=1.0 + i) for i in range(4)]
    first.append(answer(4, error="no", audio_seconds=60.0, elapsed=9.0))
    second = [answer(5, audio_seconds=6.0, session="killed", elapsed=7.0)]
    second += [
        answer(6, audio_seconds=6.0, session="killed", elapsed=6.5),
        answer(7, session="", left_out="never asked"),
    ]
    halves = [shard(first, [session("s", **MEASURED)], of=2), shard(second, number=2, of=2)]
    speed = score_task(TASK, RIGHT, halves).speed.summary()
    assert speed["seconds"] == 17.0 and speed["wall_seconds"] == 10.0
    assert (speed["sessions"], speed["killed_sessions"]) == (2, 1)
    assert speed["audio_seconds"] == 36.0 and speed["rtfx"] == pytest.approx(36 / 17)
    assert speed["items_per_second"] == pytest.approx(6 / 17)
    assert speed["tokens_per_second"] == pytest.approx(12 / 17)
    assert speed["prefill_tokens_per_second"] == 40.0 and speed["decode_tokens_per_second"] == 6.0
    assert speed["stage_seconds"] == {"encode": 1.0, "prefill": 2.0, "decode": 5.0, "other": 2.0}
    assert speed["padding"] == {"prefill": pytest.approx(0.2), "decode": 0.25, "audio": 0.25}
    assert (speed["loading_seconds"], speed["warm_up_seconds"]) == (3.0, 4.0)
    assert speed["images_per_second"] is None
    assert speed["rows"] == [16]


def test_speed_of_a_suite_is_all_audio_by_all_seconds():
    fast = [answer(0, audio_seconds=100.0, images=2)], [session("s", seconds=1.0)]
    slow = [answer(0, audio_seconds=100.0)], [session("s", seconds=9.0)]
    tasks = [score_task(TASK, RIGHT, [shard(*part)]) for part in (fast, slow)]
    speed = score_suite("set", "S", tasks).speed
    assert speed.rtfx == 20.0
    assert speed.images_per_second == 0.2


def test_without_sessions_there_is_no_speed():
    speed = score([answer(0, session="")]).speed.summary()
    assert speed["items_per_second"] is None and speed["sessions"] == 0


# --- however the run was cut ---------------------------------------------------------------------------------


def test_results_do_not_depend_on_how_the_run_was_cut():
    shuffled = random.Random(3)
    answers = [
        answer(f"{i // 2}.{i % 2}", shuffled.choice("ab"), facts={"subset": "xyz"[i % 3]}, prompt_tokens=i % 17)
        for i in range(60)
    ]
    whole = score(answers).summary()
    shuffled.shuffle(answers)
    cut = [
        shard(
            [
                dataclasses.replace(record, session=f"s{i % 2}", elapsed=float(i))
                for i, record in enumerate(answers[n::3])
            ],
            number=n + 1,
            of=3,
        )
        for n in (2, 0, 1)
    ]
    check_shards(cut)
    found = score_task(TASK, RIGHT, cut).summary()
    for timed in ("speed", "hardware"):
        del whole[timed], found[timed]
    assert found == whole


def test_some_of_the_shards_are_named():
    results = score_task(TASK, RIGHT, [shard([answer(0)], number=3, of=4), shard([answer(1)], number=1, of=4)])
    assert results.shards == "1, 3 of 4"
    assert "d, shards 1, 3 of 4" in markdown([results])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"number": 1}, r"b: shard 1 is in a too"),
        ({"of": 3}, r"b: one of 3 shards, but a of 2"),
        ({"settings": {"batch": 9}}, r"b: batch is 9, but 8 in a"),
        ({"settings": {"batch": 8, "limit": 5}}, r"b: limit is 5, but None in a"),
        ({"dataset": "e"}, r"b: dataset is 'e', but 'd' in a"),
        ({"complete": False}, r"b: shard 2 of 2 is not finished"),
        ({"answered": [answer(0)]}, r"b: item 0 is in a too"),
        ({"answered": [answer(1), answer(1)]}, r"b: item 1 is there twice"),
    ],
)
def test_shards_that_do_not_belong_together(second, message):
    first = shard([answer(0)], directory=Path("a"), of=2)
    good = shard([answer(1)], directory=Path("b"), number=2, of=2)
    check_shards([good, first])
    with pytest.raises(EvaluationError, match=message):
        check_shards([first, dataclasses.replace(good, **second)])


def test_a_missing_shard():
    with pytest.raises(EvaluationError, match="a, c: shard 2, 4 of 4 is missing"):
        check_shards([shard([], directory=Path("a"), of=4), shard([], directory=Path("c"), number=3, of=4)])


# --- writing -------------------------------------------------------------------------------------------------


def results_to_show() -> Results:
    task = dataclasses.replace(TASK, title="A | B")
    machines = [shard([answer(0)], of=2), shard([answer(1)], number=2, of=2, versions={"jax": "2"})]
    return score_task(task, ERRORS, machines)


def test_json(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    results = results_to_show()
    results.save(path)
    found = json.loads(path.read_text())
    assert found == json.loads(json.dumps(results.summary()))
    assert (found["score"], found["low"], found["high"], found["units"]) == (0.0, 0.0, 0.0, 2)
    assert found["metric"]["settings"] == {"library": "1.0"}
    assert found["published"] == {"score": 70.0, "source": "them"} and found["difference"] == -70.0
    assert found["settings"] == {"batch": 8}
    assert found["versions"] == {"jax": "1, 2"}
    assert len(found["hardware"]) == 2
    assert "answered" not in found and not [name for name in found if "resampled" in name]
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "results.json" / "full").mkdir(parents=True)
    with pytest.raises(OSError):
        replace_text(tmp_path / "results.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_markdown():
    suite = score_suite("all", "All", [results_to_show()])
    header, line, row, last = markdown([results_to_show(), suite]).splitlines()
    assert row == (
        r"| A \| B | d | 2 | error rate ↓ | 0.00 [0.00, 0.00] | 70.00 (them) | -70.00 | – | 8 × TPU v5e | – | batch 8 |"
    )
    assert header.count("|") == line.count("|") == last.count("|") == 12
    assert last.startswith("| All | 1 tasks | 2 | mean error rate ↓ | 0.00 [0.00, 0.00] | – | – | – |")


def test_environment():
    machine = environment.hardware(2, "cpu")
    assert machine["devices"] == 2 and machine["processor"]
    assert machine["memory"] > 2**28
    assert {"python", "phi4mm-jax", "jax", "jaxlib", "flax"} == environment.versions().keys()
    json.dumps(machine)
