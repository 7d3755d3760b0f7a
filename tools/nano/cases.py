"""Writes the bundled demo, and the small held-out set that the tests use, as files.

    python -m tools.nano.cases demo phi4mm_jax/assets/demo
    python -m tools.nano.cases tests tests/nano/heldout

Recordings are Ogg Vorbis, pictures PNG; cases.json says what belongs together and what is to be answered.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

import soundfile

from tools.nano.conversations import text_conversation
from tools.nano.heldout import TESTS, Item, ask, clip_of, held_out, items
from tools.nano.pictures import TILE, figure_picture, text_picture
from tools.nano.questions import answer_about
from tools.nano.speech import VOICES
from tools.nano.vocabulary import WORDS, question, sentence

_PER_TEST = 5
_DEMO_SEED = 7  # a draw that the model answers; MODEL_CARD.md says how often it does


def demo_items(seed: int = _DEMO_SEED) -> Iterable[tuple[str, Item]]:
    """The cases of `phi4mm demo`, each with its title; nothing that is said or reckoned in them was trained on."""
    rng = Random(f"demo {seed}")
    [(added, total)] = text_conversation(rng, "add", held_out=True)
    said = held_out(rng, lambda rng: sentence(rng, 7, 7))
    asked = held_out(rng, lambda rng: question(rng, "colour"))
    word = text_picture(rng, [rng.choice(WORDS)], 0.3, (TILE, TILE))
    figure = figure_picture(rng, 0.3, (TILE, TILE))
    yield "Text", Item([ask(added)], total)
    yield "Speech", Item([ask("Transcribe the audio clip into text.", clips=[clip_of(rng, said, VOICES)])], said)
    yield "A picture of a word", Item([ask("What is written in the picture?", [word])], word.text)
    yield "A picture of a figure", Item([ask("Describe the figure.", [figure])], answer_about(figure, "both"))
    spoken = ask("", [figure], [clip_of(rng, asked, VOICES)])
    yield "A picture and a spoken question", Item([spoken], answer_about(figure, "colour"))


def test_items() -> Iterable[tuple[str, Item]]:
    """A few of every held-out test."""
    for test in TESTS:
        for item in items(test, _PER_TEST, seed=1):
            yield test.name, item


def write_cases(out: Path, titled: Iterable[tuple[str, Item]]) -> None:
    """Writes the media and cases.json of items into a new directory."""
    out.mkdir(parents=True)
    cases = []
    for number, (title, item) in enumerate(titled):
        *before, last = item.messages
        case = {"title": title, "prompt": "", "expected": item.expected}
        if before:
            case["before"] = before
        for part in last["content"]:
            match part["type"]:
                case "text":
                    case["prompt"] = part["text"]
                case "image":
                    name = f"{number:03}-{len(case.setdefault('images', []))}.png"
                    part["image"].save(out / name, optimize=True)
                    case["images"].append(name)
                case "audio":
                    name = f"{number:03}.ogg"
                    soundfile.write(out / name, *part["audio"], format="OGG", subtype="VORBIS")
                    case["audios"] = [name]
        cases.append(case)
    (out / "cases.json").write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=["demo", "tests"])
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    options = parser.parse_args()
    write_cases(options.out, {"demo": demo_items, "tests": test_items}[options.which]())


if __name__ == "__main__":
    main()
