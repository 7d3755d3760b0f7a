"""The held-out tests: no sentence, sum or comparison of training, and where that is said no voice and no font of it.

Pictures are drawn from seeds of their own; what is printed on them, words of a closed vocabulary, can't be new. A test
set is a list of `Item`s, each a conversation without its last answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np

from tools.nano.conversations import TASKS, TRANSCRIBE, text_conversation
from tools.nano.fonts import fonts
from tools.nano.marks import Picture
from tools.nano.pictures import LARGEST, TILE, figure_picture, text_picture
from tools.nano.questions import READ, answer_about, ask_about_two, fits, random_picture, random_print
from tools.nano.speech import NEW_VOICES, VOICES, Voice, record
from tools.nano.vocabulary import is_held_out, question, sentence

_HARD = 1.0
_PLAIN = 0.25  # difficulty at which most print is plain


@dataclasses.dataclass(frozen=True)
class Item:
    """One question and its right answer."""

    messages: list[dict[str, Any]]
    expected: str


@dataclasses.dataclass(frozen=True)
class Test:
    """One line of the results."""

    name: str
    draw: Callable[[Random], Item]
    goal: float | None = None
    """Share of right answers, or at most this word error rate, that is aimed at."""
    words: bool = False
    """Scored by word error rate instead of whole answers."""


def ask(text: str, pictures: Sequence[Picture] = (), clips: Sequence[tuple[np.ndarray, int]] = ()) -> dict[str, Any]:
    """A user's message: pictures, recordings, then text."""
    parts = [{"type": "image", "image": picture.image} for picture in pictures]
    parts += [{"type": "audio", "audio": clip} for clip in clips]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def held_out(rng: Random, draw: Callable[[Random], str]) -> str:
    """Draws until the text is a held-out one."""
    while not is_held_out(text := draw(rng)):
        pass
    return text


def clip_of(rng: Random, text: str, voices: Sequence[Voice]) -> tuple[np.ndarray, int]:
    """A recording of a text by one of the voices: samples and rate."""
    return record(text, np.random.default_rng(rng.getrandbits(64)), voices)


# --- text ----------------------------------------------------------------------------------------------------


def _text(task: str) -> Callable[[Random], Item]:
    def draw(rng: Random) -> Item:
        *before, (asked, expected) = text_conversation(rng, task, held_out=True)
        messages = [
            {"role": role, "content": text}
            for turn in before
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        return Item([*messages, ask(asked)], expected)

    return draw


# --- speech --------------------------------------------------------------------------------------------------


def _speech(voices: Sequence[Voice]) -> Callable[[Random], Item]:
    def draw(rng: Random) -> Item:
        text = held_out(rng, lambda rng: sentence(rng, 3, 8))
        return Item([ask(rng.choice(TRANSCRIBE), clips=[clip_of(rng, text, voices)])], text)

    return draw


# --- pictures ------------------------------------------------------------------------------------------------


def _print(
    counts: Sequence[int],
    accept: Callable[[Picture], bool],
    largest: tuple[int, int] = (TILE, TILE),
    new_fonts: bool = False,
) -> Callable[[Random], Item]:
    """Pictures of as many words or numbers, of any difficulty, that `accept` takes."""

    def draw(rng: Random) -> Item:
        files = fonts(held_out=True) if new_fonts else None
        while True:
            texts = [random_print(rng) for _ in range(rng.choice(counts))]
            picture = text_picture(rng, texts, rng.random() * _HARD, largest, files)
            if accept(picture) and fits(picture, largest):
                return Item([ask(rng.choice(READ["text"]), [picture])], picture.text)

    return draw


def _figure(rng: Random) -> Item:
    picture = figure_picture(rng, rng.random() * _HARD, rng.choice(((TILE, TILE), LARGEST)))
    return Item([ask(rng.choice(READ["both"]), [picture])], answer_about(picture, "both"))


def _two_pictures(rng: Random) -> Item:
    pictures, asked, expected = ask_about_two(rng, _HARD)
    return Item([ask(asked, pictures)], expected)


def _spoken(voices: Sequence[Voice]) -> Callable[[Random], Item]:
    def draw(rng: Random) -> Item:
        picture = random_picture(rng, _PLAIN, (1, 1))
        kind = "text" if picture.text else rng.choice(("colour", "shape"))
        text = held_out(rng, lambda rng: question(rng, kind))
        return Item([ask("", [picture], [clip_of(rng, text, voices)])], answer_about(picture, kind))

    return draw


TESTS = (
    *(Test(f"text: {task}", _text(task), 0.95) for task in TASKS),
    Test("speech: known voices", _speech(VOICES), 0.05, words=True),
    Test("speech: new voices", _speech(NEW_VOICES), 0.15, words=True),
    Test("reading: one, large print", _print([1], lambda picture: picture.large_print), 0.95),
    Test("reading: two, plain background", _print([2], lambda picture: picture.plain), 0.90),
    Test("reading: one, small print", _print([1], lambda picture: not picture.large_print)),
    Test("reading: one or two, any layout, up to 3 x 2 tiles", _print([1, 2], lambda picture: True, LARGEST)),
    Test("reading: one, large print, new fonts", _print([1], lambda picture: picture.large_print, new_fonts=True)),
    Test("figure: colour and shape", _figure, 0.98),
    Test("two pictures", _two_pictures),
    Test("spoken question about a picture", _spoken(VOICES), 0.90),
    Test("spoken question, new voices", _spoken(NEW_VOICES)),
)
"""All of them, each with the goal that it was built for."""


def items(test: Test, count: int, seed: int = 0) -> list[Item]:
    """Draws a test set."""
    rng = Random(f"held out {test.name} {seed}")
    return [test.draw(rng) for _ in range(count)]
