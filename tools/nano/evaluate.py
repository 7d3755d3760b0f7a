"""Measures a phi4mm-nano on the held-out tests, as a user would call it, greedily and in float32.

    python -m tools.nano.evaluate CHECKPOINT [--count 200] [--card MODEL_CARD.md]

Prints the results, and with --card writes them into the model card, between its two marks. The last lines force the
wrong adapter: what was learned must then be gone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import jiwer
from tqdm import tqdm

from phi4mm_jax import Phi4MM
from phi4mm_jax.processing.prompt import InputMode
from phi4mm_jax.runtime import engine
from phi4mm_jax.runtime.prefill import adapter_for
from tools.nano.heldout import TESTS, Test, items

_ROWS = 20
_MARKS = ("<!-- results -->\n", "<!-- end of results -->\n")


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the results."""

    name: str
    score: float
    """Share of answers that are right to the letter, or word error rate."""
    goal: float | None
    words: bool
    mistakes: list[tuple[str, str]]
    """Expected and given, where they differ."""

    @property
    def line(self) -> str:
        """A row of the table."""
        measure, compare = ("word error rate", "at most") if self.words else ("exact", "at least")
        goal = "" if self.goal is None else f"{compare} {self.goal:.0%}"
        return f"| {self.name} | {measure} | {self.score:.1%} | {goal} |"


@contextlib.contextmanager
def wrong_adapter() -> Iterator[None]:
    """Within it, pictures go through the speech adapter and speech through the vision adapter."""

    def swapped(mode: InputMode) -> str | None:
        return {"vision": "speech", "speech": "vision"}.get(adapter_for(mode))

    with mock.patch.object(engine, "adapter_for", swapped):
        yield


def measure(model: Phi4MM, test: Test, count: int) -> Result:
    """Runs one test."""
    drawn = items(test, count)
    given = []
    for start in range(0, count, _ROWS):
        outputs = model.generate([item.messages for item in drawn[start : start + _ROWS]], max_tokens=48)
        given += [output.text for output in outputs]
    expected = [item.expected for item in drawn]
    mistakes = [pair for pair in zip(expected, given, strict=True) if pair[0] != pair[1]]
    score = jiwer.wer(expected, given) if test.words else 1 - len(mistakes) / count
    return Result(test.name, score, test.goal, test.words, mistakes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="directory, or nano")
    parser.add_argument("--count", type=int, default=200, help="items of each test (%(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only tests whose name holds this")
    parser.add_argument("--mistakes", type=int, default=0, metavar="N", help="show the first N of each test")
    parser.add_argument("--card", type=Path, help="model card to write the results into")
    options = parser.parse_args(arguments)
    if options.card and options.only:
        parser.error("--card takes all tests, not those of --only")
    card = options.card.read_text(encoding="utf-8") if options.card else ""
    if options.card and not all(mark in card for mark in _MARKS):
        parser.error(
            f"{options.card}: has no lines {' and '.join(map(str.strip, _MARKS))} to write the results between"
        )
    model = Phi4MM.from_pretrained(options.checkpoint, dtype="float32", progress=False)
    tests = [test for test in TESTS if options.only in test.name]
    lines = ["| Test | Measure | Result | Goal |", "|---|---|---|---|"]
    print("\n".join(lines))

    def report(result: Result) -> None:
        lines.append(result.line)
        tqdm.write(result.line, file=sys.stdout)
        for expected, given in result.mistakes[: options.mistakes]:
            tqdm.write(f"    {expected!r} -> {given!r}", file=sys.stdout)

    adapted = [test for test in tests if not test.name.startswith("text")]
    with tqdm(total=len(tests) + len(adapted), unit="test", disable=not sys.stderr.isatty()) as bar:
        for test in tests:
            report(measure(model, test, options.count))
            bar.update()
        with wrong_adapter():
            for test in adapted:
                result = measure(model, test, options.count)
                report(dataclasses.replace(result, name=f"{test.name}, wrong adapter", goal=None))
                bar.update()
    if options.card:
        before, _, rest = card.partition(_MARKS[0])
        after = rest.partition(_MARKS[1])[2]
        results = "\n".join((f"{options.count} items of each test.\n", *lines, ""))
        options.card.write_text(before + _MARKS[0] + results + _MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    main()
