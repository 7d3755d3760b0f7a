"""What is on disk of a task: what is asked, and a line for each item that was answered.

OUT/TASK/about-1-of-1.json        what was asked, how, and on what
OUT/TASK/items-1-of-1.jsonl       `Answered`, as they came
OUT/TASK/sessions-1-of-1.jsonl    what each run of the program measured, those that were killed aside
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from phi4mm_jax.evaluation.items import Answered, EvaluationError
from phi4mm_jax.evaluation.results import replace_text
from phi4mm_jax.evaluation.shards import Shard, first_difference
from phi4mm_jax.processing.display import quote

logger = logging.getLogger(__name__)


def parse_shard(text: str) -> tuple[int, int]:
    """Reads "I/N": which shard, from 1, of how many.

    Raises:
      EvaluationError: it is not of this form.
    """
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal()):
        raise EvaluationError(f"shard {quote(text)}: expected I/N with I from 1 to N, such as 1/4")
    return int(number), int(of)


def make_directory(path: Path) -> None:
    """Makes a directory, if it is not there.

    Raises:
      EvaluationError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be made a directory ({error.strerror})") from None


def task_directory(out: Path, task: str) -> Path:
    """Where a task's files are."""
    return out / task.replace("/", "__")


class Store:
    """The files of one part of a task, while it is being run; nobody else may write them meanwhile."""

    def __init__(
        self,
        directory: Path,
        part: tuple[int, int],
        *,
        dataset: str,
        settings: Mapping[str, Any],
        versions: Mapping[str, str],
        hardware: Mapping[str, Any],
    ):
        """Opens them, to go on where they end; a line that was cut short is dropped.

        Args:
          directory: of the task.
          part: which of how many parts.
          dataset: what is asked.
          settings: JSON values that, like the dataset, must be the same whenever the run goes on.
          versions: of libraries.
          hardware: the machine.

        Raises:
          EvaluationError: the files belong to another dataset or settings, or are damaged, or another process writes.
        """
        make_directory(directory)
        self._files = _Files(directory, f"{part[0]}-of-{part[1]}")
        self._lock = FileLock(directory / f".lock-{self._files.suffix}", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise EvaluationError(f"{directory}: another process is answering this shard") from None
        try:
            about = {"dataset": dataset, "settings": dict(settings), "versions": versions, "hardware": hardware}
            self._files.write_about(about)
            for path in (self._files.items, self._files.sessions):
                _drop_cut_line(path)
            self.answered = read_items(self._files.items)
            self._items: IO[str] = self._files.items.open("a", encoding="utf-8", errors="replace")  # lone surrogates
        except BaseException:
            self._lock.release()
            raise

    def append(self, answered: Answered) -> None:
        """Writes an item's line; a process that is killed later has not lost it."""
        self._items.write(json.dumps(dataclasses.asdict(answered), ensure_ascii=False) + "\n")
        self._items.flush()
        self.answered.append(answered)

    def end_session(self, measured: Mapping[str, Any]) -> None:
        """Writes what a session measured; its field `complete` says whether nothing is left to answer."""
        with self._files.sessions.open("a", encoding="utf-8") as file:
            file.write(json.dumps(measured) + "\n")

    def close(self) -> None:
        """Lets others write."""
        try:
            self._items.close()  # which fails on a full disk
        finally:
            self._lock.release()


def read_shards(directory: Path) -> list[Shard]:
    """All parts of a task that a directory holds.

    Raises:
      EvaluationError: a file is damaged.
    """
    shards = []
    for path in sorted(directory.glob("about-*.json")):
        match = re.fullmatch(r"about-(\d+)-of-(\d+)", path.stem)
        files = _Files(directory, path.stem.removeprefix("about-"))
        sessions = _read_sessions(files)
        shards.append(
            Shard(
                directory=directory,
                number=int(match[1]),
                of=int(match[2]),
                complete=_ends(sessions),
                answered=read_items(files.items),
                sessions=sessions,
                **json.loads(path.read_text(encoding="utf-8")),
            )
        )
    return shards


def read_items(path: Path) -> list[Answered]:
    """The lines of a file; none if there is no file.

    Raises:
      EvaluationError: a line is damaged.
    """
    found = (_parsed(path, *line) for line in _lines(path))
    return [Answered(**(fields | {"references": tuple(fields["references"])})) for fields in found]


@dataclasses.dataclass(frozen=True)
class _Files:
    directory: Path
    suffix: str

    @property
    def items(self) -> Path:
        return self.directory / f"items-{self.suffix}.jsonl"

    @property
    def sessions(self) -> Path:
        return self.directory / f"sessions-{self.suffix}.jsonl"

    def write_about(self, about: Mapping[str, Any]) -> None:
        """Writes what is being run, if it is what the files are of."""
        path = self.directory / f"about-{self.suffix}.json"
        if path.exists():
            there = json.loads(path.read_text(encoding="utf-8"))
            as_read = json.loads(json.dumps(about))  # which turns tuples into lists
            old, new = ({"dataset": a["dataset"], **a["settings"]} for a in (there, as_read))
            if name := first_difference(old, new):
                raise EvaluationError(
                    f"{self.directory}: was begun with {name} = {quote(old.get(name))}, not "
                    f"{quote(new.get(name))}; go on with that, or take another --out"
                )
        replace_text(path, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def wait_for_all(directory: Path, of: int) -> None:
    """Waits until other processes have answered all of so many parts; logs once which ones it waits for."""
    files = [_Files(directory, f"{number}-of-{of}") for number in range(1, of + 1)]
    told = False
    while missing := [part.suffix for part in files if not _ends(_read_sessions(part))]:
        if not told:
            logger.warning("%s, which all processes must share: waiting for %s", directory, ", ".join(missing))
            told = True
        time.sleep(1)


def _read_sessions(files: _Files) -> list[dict[str, Any]]:
    return [_parsed(files.sessions, *line) for line in _lines(files.sessions)]


def _ends(sessions: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of the sessions left nothing to answer."""
    return any(session["complete"] for session in sessions)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The whole lines of a file, numbered: another process may be writing one."""
    with contextlib.suppress(FileNotFoundError), path.open(encoding="utf-8") as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.endswith("\n"))


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:
        raise EvaluationError(f"{path}, line {number}: is damaged; without it, its item is answered anew") from None


def _drop_cut_line(path: Path) -> None:
    """Shortens a file to its last whole line: a process that was killed may have left a part of one."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
