"""Files of a task: what may go on, and what others see meanwhile."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from phi4mm_jax.evaluation.items import Answered, EvaluationError
from phi4mm_jax.evaluation.store import Store, read_shards, wait_for_all


def store(directory: Path, part: tuple[int, int] = (1, 1), **settings: Any) -> Store:
    return Store(directory, part, dataset="rows", settings={"task": "x"} | settings, versions={}, hardware={})


def record(id: str, prompt: str = "") -> Answered:
    return Answered(id=id, name=id, prompt=prompt, references=("a",), facts={})


def test_settings_are_compared_as_they_are_written(tmp_path: Path) -> None:
    store(tmp_path, keep=("a", "b")).close()
    store(tmp_path, keep=("a", "b")).close()
    with pytest.raises(EvaluationError, match=r"was begun with keep = \['a', 'b'\], not \['c'\]"):
        store(tmp_path, keep=("c",))


def test_a_line_that_was_cut_is_answered_anew(tmp_path: Path) -> None:
    first = store(tmp_path)
    first.append(record("0"))
    first.append(record("1", "lone \ud800"))
    first.close()
    path = tmp_path / "items-1-of-1.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "2", "na')
    again = store(tmp_path)
    assert [found.id for found in again.answered] == ["0", "1"]
    again.append(record("2"))
    again.close()
    [shard] = read_shards(tmp_path)
    assert [found.id for found in shard.answered] == ["0", "1", "2"] and not shard.complete


def test_nobody_else_writes_meanwhile_and_somebody_does_after_a_full_disk(tmp_path: Path) -> None:
    first = store(tmp_path)
    with pytest.raises(EvaluationError, match="another process is answering this shard"):
        store(tmp_path)
    first._items.close()
    first._items = Path("/dev/full").open("a", encoding="utf-8")
    with pytest.raises(OSError, match="No space left"):
        first.append(record("0"))
    with pytest.raises(OSError, match="No space left"):
        first.close()
    store(tmp_path).close()


def test_who_waits_says_for_whom(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = [store(tmp_path, (number, 2)) for number in (1, 2)]
    parts[0].end_session({"complete": True})
    with caplog.at_level(logging.WARNING):
        waiting = threading.Thread(target=wait_for_all, args=(tmp_path, 2))
        waiting.start()
        while not caplog.messages:
            assert waiting.is_alive()
        parts[1].end_session({"complete": True})
        waiting.join()
    assert [message.partition(": ")[2] for message in caplog.messages] == ["waiting for 2-of-2"]
    for part in parts:
        part.close()
