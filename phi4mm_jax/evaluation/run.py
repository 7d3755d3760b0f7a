"""`evaluate`: tasks and a model in, scores and a report out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from phi4mm_jax.api import Phi4MM
from phi4mm_jax.evaluation.environment import hardware, versions
from phi4mm_jax.evaluation.gathering import score, write
from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.metrics.registry import metric
from phi4mm_jax.evaluation.pipeline import prepare
from phi4mm_jax.evaluation.progress import Progress
from phi4mm_jax.evaluation.results import Results
from phi4mm_jax.evaluation.session import Session
from phi4mm_jax.evaluation.shards import check_shards
from phi4mm_jax.evaluation.sources import Source, open_source, rows_of_shard
from phi4mm_jax.evaluation.store import Store, make_directory, parse_shard, read_shards, task_directory, wait_for_all
from phi4mm_jax.evaluation.tasks.catalogue import find
from phi4mm_jax.evaluation.tasks.suite import Suite, tasks_of
from phi4mm_jax.evaluation.tasks.task import Task
from phi4mm_jax.runtime.steps import Steps

_MOST_ROWS = 256
"""That are tried on an accelerator; the service takes fewer where memory ends."""
_WINDOWS = 4
"""Items that are sorted among each other, as a multiple of the rows."""

Asked = str | Path | Task | Suite


def evaluate(
    tasks: Asked | Sequence[Asked],
    model: str | Path | Phi4MM,
    *,
    limit: int | None = None,
    data: str | Path | None = None,
    out: str | Path = "evaluation",
    batch: int | Literal["auto"] = "auto",
    shard: str | None = None,
    workers: int | None = None,
    progress: bool = True,
    **loading: Any,
) -> list[Results]:
    """Asks a model everything that tasks consist of, scores the answers, and writes a report.

    It goes on where an earlier run with the same arguments ended, however that ended. Under `jax.distributed` each
    process answers its part on its own devices, and the first one writes the results of all; `out` must be shared.

    Args:
      tasks: names (see `CATALOGUE`), paths of a JSONL, a CSV or a folder of one's own, tasks and suites.
      model: a loaded one, or its name.
      limit: only the first rows of each dataset.
      data: where the rows are, if not on the hub: see `open_source`.
      out: the directory to write.
      batch: rows that are answered together; "auto" for as many as the memory of an accelerator holds, on a CPU for
        `engine.max_batch`.
      shard: "I/N" answers the I-th of N equal parts and writes no report; see `merge`.
      workers: threads that decode and process media; None for one per processor.
      progress: show it on standard error.
      **loading: arguments of `Phi4MM.from_pretrained`, for a model by name.

    Returns:
      The results of each task and of each suite, in their order; a suite comes after its tasks.

    Raises:
      EvaluationError: a task, a dataset, an option, or what `out` holds cannot be used.
      ConfigError, HubError, CheckpointError, MemoryPlanError: of the model.
    """
    out = Path(out)
    entries = [_entry(asked) for asked in ([tasks] if isinstance(tasks, Asked) else tasks)]
    if batch != "auto" and (not isinstance(batch, int) or batch < 1):
        raise EvaluationError(f"batch = {batch!r}: expected 'auto' or at least 1")
    part = parse_shard(shard) if shard is not None else None
    if workers is not None and workers < 1:
        raise EvaluationError(f"workers = {workers}: expected at least 1")
    if loading and isinstance(model, Phi4MM):
        raise EvaluationError(f"{', '.join(loading)}: only for a model by name; this one is loaded")
    planned = _by_name([task for entry in entries for task in tasks_of(entry)]).values()
    sources = {task.name: open_source(task.source, data) for task in planned}
    make_directory(out)
    for task in planned:
        _check(task, sources[task.name], limit, part or (1, 1))
    begun = time.perf_counter()
    if not isinstance(model, Phi4MM):
        model = Phi4MM.from_pretrained(model, progress=progress, **loading)
    loading_seconds = time.perf_counter() - begun
    part = part or (jax.process_index() + 1, jax.process_count())
    steps = _steps(model, batch)
    model.service.release()  # its cache makes room
    for task in planned:
        source = sources[task.name]
        rows = rows_of_shard(len(source), limit, part)
        store = Store(
            task_directory(out, task.name),
            part,
            dataset=source.description,
            settings=_settings(task, model, limit) | {"fingerprint": source.fingerprint},
            versions=versions(),
            hardware=hardware(steps.mesh.size, steps.mesh.devices.flat[0].device_kind),
        )
        with contextlib.closing(store):
            items = prepare(
                task,
                source,
                model.processor,
                rows=rows,
                done={answered.id for answered in store.answered},
                window=_WINDOWS * steps.runtime.engine.max_batch,
                workers=workers or os.cpu_count() or 1,
            )
            shown = Progress(task.name, task.metric, len(rows), (a.id for a in store.answered), progress)
            with shown, contextlib.closing(items):
                session = Session(
                    steps, model.weights, model.processor.tokenizer, task, metric(task.metric), store, shown
                )
                session.run(items, loading_seconds)
        loading_seconds = 0.0
    if shard is None:
        for task in planned:
            wait_for_all(task_directory(out, task.name), part[1])
    shards = {  # what other runs have left there is no part of this one
        task.name: [found for found in read_shards(task_directory(out, task.name)) if found.of == part[1]]
        for task in planned
    }
    if shard is not None:
        own = {name: [found for found in parts if found.number == part[0]] for name, parts in shards.items()}
        return score(entries, own)
    for parts in shards.values():
        check_shards(parts)
    results = score(entries, shards)
    if jax.process_index() == 0:
        write(results, {task.name: (task, sources[task.name]) for task in planned}, out)
    return results


def _entry(asked: Asked) -> Task | Suite:
    return asked if isinstance(asked, (Task, Suite)) else find(str(asked))


def _by_name(tasks: Sequence[Task]) -> dict[str, Task]:
    """Tasks, each once.

    Raises:
      EvaluationError: two differ but for their name; they would share their files.
    """
    named: dict[str, Task] = {}
    for task in tasks:
        first = named.setdefault(task.name, task)
        if dataclasses.replace(first, prepare=None) != dataclasses.replace(task, prepare=None):  # made anew each time
            raise EvaluationError(
                f"{task.name}: the name of two tasks, of {first.source} and of {task.source}; run them one by one, "
                "each with its own --out"
            )
    return named


def _check(task: Task, source: Source, limit: int | None, part: tuple[int, int]) -> None:
    """Finds what is wrong with a task before anything expensive begins.

    Raises:
      EvaluationError: its metric cannot be had, there are no rows, the first has not what it needs, or there is no such
        shard.
    """
    measure = metric(task.metric).measure
    if not rows_of_shard(len(source), limit, part):
        raise EvaluationError(f"{source.description}: has no rows, or fewer than shards")
    for item in task.items(0, source[0], source.directory):
        measure("", item.references, item.facts)


def _steps(model: Phi4MM, batch: int | Literal["auto"]) -> Steps:
    """The model's programs for so many rows."""
    steps, rows = model.steps, batch
    if rows == "auto":
        is_cpu = steps.mesh.devices.flat[0].platform == "cpu"
        rows = steps.runtime.engine.max_batch if is_cpu else max(steps.runtime.engine.max_batch, _MOST_ROWS)
    if rows == steps.runtime.engine.max_batch:
        return steps
    return Steps(steps.model, steps.runtime.override(engine={"max_batch": rows}), steps.mesh)


def _settings(task: Task, model: Phi4MM, limit: int | None) -> dict[str, Any]:
    """All that answers and scores depend on, but for rounding."""
    runtime = model.steps.runtime
    is_snapshot = model.directory.parent.name == "snapshots"
    quantization = dataclasses.asdict(runtime.quantization)
    return {
        "task": task.name,
        "model": model.name,
        "revision": model.directory.name if is_snapshot else None,
        "prompt": task.prompt,
        "max_tokens": task.max_tokens,
        "ignore_eos": task.ignore_eos or None,
        "metric": task.metric,
        "limit": limit,
        "weights": runtime.dtypes.params,
        "activations": runtime.dtypes.activations,
        "kv_cache": runtime.dtypes.kv_cache,
        **({f"quantization.{name}": value for name, value in quantization.items() if runtime.quantization.quantizes}),
    }
