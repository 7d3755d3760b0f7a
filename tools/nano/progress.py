"""How a training stage is going: a line in log.jsonl now and then, a bar on a terminal, a plot at the end."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import jax
from tqdm import tqdm

_STEPS_PER_LINE = 50
_ACCURACY = "exact"


class Progress:
    """Collects what every step reports; a context manager."""

    def __init__(self, directory: Path, first: int, steps: int):
        """Goes on with the log of a stage.

        Args:
          directory: that of the stage.
          first: steps that have been done; later lines of an interrupted run are dropped.
          steps: how many there will be.
        """
        self._steps, self._index = steps, first
        self._path = directory / "log.jsonl"
        lines = [line for line in _lines(self._path) if line["step"] <= first]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._bar = tqdm(desc=directory.name, initial=first, total=steps, unit="step", disable=not sys.stderr.isatty())
        self._begin_line()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._bar.close()
        if kind is None:
            _plot(self._path)

    def step(self, metrics: dict[str, jax.Array]) -> None:
        """Counts a step with its losses and accuracy."""
        self._index += 1
        self._count += 1
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value  # stays on the device until a line is due
        self._bar.update()
        if self._index % _STEPS_PER_LINE == 0 or self._index == self._steps:
            means = {name: round(float(total) / self._count, 4) for name, total in self._sums.items()}
            line = {"step": self._index, **means, "seconds": round(time.monotonic() - self._since, 1)}
            with self._path.open("a") as log:
                log.write(json.dumps(line) + "\n")
            self._bar.set_postfix(means)
            if self._bar.disable:
                print(line, flush=True)
            self._begin_line()

    def _begin_line(self) -> None:
        self._sums: dict[str, jax.Array | float] = {}
        self._count, self._since = 0, time.monotonic()


def logged_steps(directory: Path) -> int:
    """How many steps the log of a stage in this directory has."""
    return int(max((line["step"] for line in _lines(directory / "log.jsonl")), default=0))


def _lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _plot(log: Path) -> None:
    """Draws the losses and, on an axis of its own, the accuracy of a stage to loss.png beside its log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = _lines(log)
    steps = [line["step"] for line in lines]
    figure, losses = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for name in lines[-1]:
        if name not in ("step", "seconds", _ACCURACY):
            losses.plot(steps, [line.get(name) for line in lines], label=f"loss: {name}", linewidth=1)
    losses.set(title=log.parent.name, xlabel="step", yscale="log")
    losses.legend(loc="lower left")
    if _ACCURACY in lines[-1]:
        accuracy = losses.twinx()
        accuracy.plot(steps, [line.get(_ACCURACY) for line in lines], color="grey", linewidth=1)
        accuracy.set(ylabel="answers that are right (grey)", ylim=(0, 1))
    figure.savefig(log.parent / "loss.png", dpi=120)
    pyplot.close(figure)
