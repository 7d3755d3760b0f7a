"""Writes small sets of every kind that phi4mm-nano can be evaluated on, each with a task `nano/...` of its own.

    python -m tools.nano.evaluation_sets OUT [--count 20 | --cases tests/nano/heldout]
    phi4mm eval nano --model nano --data OUT
    phi4mm eval OUT/custom/questions.jsonl OUT/custom/recordings.jsonl --model nano

Items are drawn as those of the held-out tests, which takes the voices and fonts of the training, or come from a
directory that `tools.nano.cases` wrote. OUT is in the layout of the hub; OUT/custom has JSONL beside its media.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import soundfile

from phi4mm_jax.demo import Case, read_cases
from tools.hub_layout import medium, write_dataset
from tools.nano.cases import write_cases
from tools.nano.heldout import TESTS, items
from tools.nano.vocabulary import COLOURS

_OPTIONS = 4


def evaluation_sets(cases: Sequence[Case]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the `nano/...` tasks by part; a part without any cases is left out."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        for part, row in _rows(case):
            rows.setdefault(part, []).append(row)
    return rows


def _rows(case: Case) -> Iterator[tuple[str, dict[str, Any]]]:
    """The parts that a case belongs to, with its row in each."""
    test, _, kind = case.title.partition(": ")
    asked = {"question": case.prompt, "answers": [case.expected]}
    match test:
        case "text":
            if not case.before:  # an item is one question
                yield "text", asked | {"kind": kind}
        case "speech":
            audio = medium(case.audios[0])
            yield "asr", {"audio": audio, "text": case.expected, "voices": kind, "audio_length_s": _seconds(case)}
            yield "translation", {"audio": audio, "sentence": case.expected, "translation": case.expected}
        case "reading":
            image = medium(case.images[0])
            yield "reading", asked | {"image": image, "kind": kind}
            ocr = {"dataset": "nano", "question_type": kind, "image": image}
            yield "ocr", ocr | {"question": case.prompt, "answer": [case.expected]}
        case "figure":
            image = medium(case.images[0])
            yield "figures", asked | {"image": image}
            colour, _ = case.expected.split()
            yield "choice", {"image": image, "question": "What colour is the figure?"} | _options(colour)
        case "two pictures":
            yield "pairs", asked | {"images": [medium(path) for path in case.images]}
        case "spoken question about a picture" | "spoken question, new voices":
            media = {"image": medium(case.images[0]), "audio": medium(case.audios[0])}
            voices = "new voices" if test.endswith("new voices") else "known voices"
            yield "spoken", media | {"answers": [case.expected], "voices": voices}


def _seconds(case: Case) -> float:
    return soundfile.info(case.audios[0]).duration


def _options(right: str) -> dict[str, Any]:
    """A few colours, one of them the right one, and its number."""
    rng = Random(right)
    options = rng.sample([colour for colour in COLOURS if colour != right], _OPTIONS - 1)
    answer = rng.randrange(_OPTIONS)
    options.insert(answer, right)
    return {"options": options, "answer": str(answer)}


def write_custom(out: Path, cases: Sequence[Case]) -> None:
    """Writes two files of one's own, with their media: questions of all kinds, and recordings to be transcribed."""
    out.mkdir(parents=True)
    questions, recordings = [], []
    for case in cases:
        for path in (*case.images, *case.audios):
            shutil.copy(path, out / path.name)
        if case.title.startswith("speech"):
            line = {"audio_filepath": case.audios[0].name, "text": case.expected, "duration": _seconds(case)}
            recordings.append(line)
        elif not case.before:
            media = {"images": [path.name for path in case.images], "audios": [path.name for path in case.audios]}
            questions.append(media | {"prompt": case.prompt, "answers": [case.expected], "metric": "exact"})
    for name, lines in (("questions", questions), ("recordings", recordings)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    parser.add_argument("--count", type=int, default=20, help="items drawn of each held-out test (%(default)s)")
    parser.add_argument("--cases", type=Path, help="directory of cases to take instead")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as drawn:
        directory = options.cases
        if directory is None:
            directory = Path(drawn) / "cases"
            write_cases(directory, ((test.name, item) for test in TESTS for item in items(test, options.count)))
        cases = read_cases(directory)
        if not (parts := evaluation_sets(cases)):
            parser.error(f"{directory}: has no cases of the held-out tests")
        options.out.mkdir(parents=True)
        write_dataset(options.out, {part: {"test": rows} for part, rows in parts.items()})
        write_custom(options.out / "custom", cases)


if __name__ == "__main__":
    main()
