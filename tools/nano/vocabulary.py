"""What phi4mm-nano talks about: its words, its numbers, and the sentences made of them.

Everything is drawn from a `random.Random`, so a seed decides it. A sentence belongs to training or to the held-out
evaluation by a hash of its text alone: no generator can mix the two.
"""

from __future__ import annotations

import zlib
from random import Random

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
_UNITS += ["seventeen", "eighteen", "nineteen"]
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
NUMBER_WORDS = (*_UNITS, *_TENS)

_OWNERS = ("the", "my", "your")
_ADJECTIVES = (*COLOURS, *"big small old new hot cold happy soft dark good".split())
_NOUNS = (
    *"cat dog bird fish horse tree flower house garden river moon rain snow fire stone bread milk apple lemon".split(),
    *"water sugar coffee table chair door window lamp clock book paper pencil letter music song ship train bus".split(),
    *"road bridge city king queen doctor teacher baby hand foot picture number word colour shape figure".split(),
    *SHAPES,
)
_VERBS = "sees finds likes takes holds brings wants paints follows carries".split()
_PREPOSITIONS = "in on under behind with near".split()
_ASKING = "what which is are shown here written how many say please tell me and".split()

WORDS = tuple(dict.fromkeys((*_OWNERS, *_ADJECTIVES, *_NOUNS, *_VERBS, *_PREPOSITIONS, *_ASKING, *NUMBER_WORDS)))
"""The closed vocabulary of speech and of reading. No two of them sound alike."""

_HELD_OUT = 10  # one sentence in so many


def is_held_out(text: str) -> bool:
    """Whether this text is kept from training, for the evaluation."""
    return zlib.crc32(text.encode()) % _HELD_OUT == 0


def number_in_words(number: int) -> str:
    """Spells a number from 0 to 99: 42 -> "forty two"."""
    if number < len(_UNITS):
        return _UNITS[number]
    tens, unit = divmod(number, 10)
    return _TENS[tens - 2] + (f" {_UNITS[unit]}" if unit else "")


def sentence(rng: Random, min_words: int = 1, max_words: int = 8) -> str:
    """Draws a sentence: half of them follow a small grammar, the others are bare words or numbers."""
    while True:
        text = rng.choices((_statement, _words, _numbers), (5, 3, 3))[0](rng, min_words, max_words)
        if min_words <= len(text.split()) <= max_words:
            return text


def _thing(rng: Random) -> list[str]:
    owner = number_in_words(rng.randrange(100)) if rng.random() < 0.15 else rng.choice(_OWNERS)
    return [owner, *([rng.choice(_ADJECTIVES)] if rng.random() < 0.5 else []), rng.choice(_NOUNS)]


def _statement(rng: Random, min_words: int, max_words: int) -> str:
    parts = _thing(rng)
    if rng.random() < 0.8:
        parts += [rng.choice(_VERBS), *_thing(rng)]
    if rng.random() < 0.4:
        parts += [rng.choice(_PREPOSITIONS), *_thing(rng)]
    return " ".join(parts)


def _words(rng: Random, min_words: int, max_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(min_words, max_words)))


def _numbers(rng: Random, min_words: int, max_words: int) -> str:
    numbers = (rng.randrange(10 if rng.random() < 0.4 else 100) for _ in range(rng.randint(min_words, max_words)))
    return " ".join(map(number_in_words, numbers))


# --- questions about a picture -------------------------------------------------------------------------------

_OPENINGS = ("", "please tell me ", "tell me ", "say ", "please say ")
_QUESTIONS = {
    "text": (
        "what is written here",
        "what is written in the picture",
        "what word is shown",
        "what word is in the picture",
        "which word is written here",
        "what number is shown here",
        "which number is in the picture",
    ),
    "colour": (
        "what colour is the shape",
        "what colour is the figure",
        "which colour is shown here",
        "which colour is in the picture",
        "what colour is the figure in the picture",
    ),
    "shape": (
        "what shape is shown",
        "what shape is in the picture",
        "which shape is shown here",
        "which figure is in the picture",
        "what figure is shown here",
    ),
}
QUESTION_KINDS = tuple(_QUESTIONS)
"""What a question about a picture asks for."""


def question(rng: Random, kind: str) -> str:
    """Draws a question that is asked aloud about a picture, all of its words in the vocabulary."""
    return rng.choice(_OPENINGS) + rng.choice(_QUESTIONS[kind])
