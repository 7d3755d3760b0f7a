"""What shards have answered, brought together: results, and the files that show them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from phi4mm_jax.evaluation.items import EvaluationError, Item
from phi4mm_jax.evaluation.metrics.registry import metric
from phi4mm_jax.evaluation.report import write_report
from phi4mm_jax.evaluation.results import Results, replace_text, score_suite, score_task
from phi4mm_jax.evaluation.shards import Shard, check_shards
from phi4mm_jax.evaluation.sources import Source, open_source
from phi4mm_jax.evaluation.store import make_directory, read_shards, task_directory
from phi4mm_jax.evaluation.tables import markdown
from phi4mm_jax.evaluation.tasks.catalogue import CATALOGUE, named
from phi4mm_jax.evaluation.tasks.custom import custom
from phi4mm_jax.evaluation.tasks.suite import Suite, tasks_of
from phi4mm_jax.evaluation.tasks.task import Task


def merge(directories: Sequence[str | Path], out: str | Path, data: str | Path | None = None) -> list[Results]:
    """Scores what shards have answered, each in a directory or all in one, as if one run had answered it.

    Args:
      directories: those that `evaluate` wrote to.
      out: the directory for results and report.
      data: where the rows are, as of `evaluate`; without them, the report shows no media.

    Returns:
      Results of all tasks, and of the suites of which all tasks are there.

    Raises:
      EvaluationError: a shard is missing, unfinished or of another evaluation, or a file is damaged.
    """
    shards: dict[str, list[Shard]] = {}
    for directory in map(Path, directories):
        found = [shard for path in sorted(directory.glob("*/")) for shard in read_shards(path)]
        if not found:
            raise EvaluationError(f"{directory}: holds no results of an evaluation")
        for shard in found:
            shards.setdefault(shard.settings["task"], []).append(shard)
    tasks = [_task(parts[0]) for parts in shards.values()]
    suites = [entry for entry in CATALOGUE if isinstance(entry, Suite)]
    whole = [suite for suite in suites if {task.name for task in suite.tasks} <= shards.keys()]
    for parts in shards.values():
        check_shards(parts)
    results = score([*tasks, *whole], shards)
    asked = {}
    for task in tasks:
        with contextlib.suppress(EvaluationError):
            asked[task.name] = task, open_source(task.source, data)
    write(results, asked, Path(out))
    return results


def score(entries: Sequence[Task | Suite], shards: Mapping[str, Sequence[Shard]]) -> list[Results]:
    """Scores tasks, each once, and suites after their tasks.

    Args:
      entries: what was asked for.
      shards: of each task by name.

    Raises:
      EvaluationError: shards do not belong together, or some are missing or unfinished.
    """
    results: dict[str, Results] = {}
    for entry in entries:
        for task in tasks_of(entry):
            if task.name not in results:
                results[task.name] = score_task(task, metric(task.metric), shards[task.name])
        if isinstance(entry, Suite) and entry.averaged:
            parts = [results[task.name] for task in entry.tasks]
            results[entry.name] = score_suite(entry.name, entry.title, parts, entry.digits, entry.published, entry.note)
    return list(results.values())


def write(results: Sequence[Results], asked: Mapping[str, tuple[Task, Source]], out: Path) -> None:
    """Writes the `results.json` of each task and suite, and `results.md` and `report.html` of all.

    Args:
      results: of all.
      asked: tasks by name, with their rows, for the media that the report shows; some may be missing.
      out: the directory.
    """

    def media_of(name: str, id: str) -> Item | None:
        if name not in asked:
            return None
        task, source = asked[name]
        row = int(id.partition(".")[0])
        return next((item for item in task.items(row, source[row], source.directory) if item.id == id), None)

    for result in results:
        directory = task_directory(out, result.name)
        make_directory(directory)
        result.save(directory / "results.json")
    replace_text(out / "results.md", markdown(results))
    write_report(out / "report.html", results, media_of, results[0].settings["model"])


def _task(shard: Shard) -> Task:
    """What a shard was asked: a task that is known by name, or one's own, with its rows if they are at hand."""
    settings = shard.settings
    known = named(settings["task"])
    own = {name: settings[name] for name in ("prompt", "max_tokens", "metric")}
    if isinstance(known, Task) and all(getattr(known, name) == value for name, value in own.items()):
        return known  # and not a file of one's own that is called like it
    with contextlib.suppress(EvaluationError):
        return dataclasses.replace(custom(shard.dataset, **own), name=settings["task"])
    return Task(name=settings["task"], title=settings["task"], source=Path(shard.dataset), **own)
