"""The text tasks of phi4mm-nano: adding, comparing, counting, reversing, and repeating over several turns."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tools.nano.vocabulary import is_held_out, sentence

Turns = list[tuple[str, str]]
"""What the user says and what is to be answered, turn by turn."""

SYSTEM = ("You are a helpful assistant.", "Answer briefly.")
"""System messages that some of the training conversations begin with."""


def _add(rng: Random) -> tuple[list[str], Turns]:
    a, b = rng.randrange(100), rng.randrange(100)
    forms = "What is {} plus {}?", "Add {} and {}.", "{} + {} = ?", "How much is {} plus {}?"
    return [f"{a}+{b}", f"{b}+{a}"], [(rng.choice(forms).format(a, b), str(a + b))]


def _compare(rng: Random) -> tuple[list[str], Turns]:
    a, b = rng.sample(range(100), 2)
    form, answer = rng.choice(
        (
            ("Which is larger, {} or {}?", str(max(a, b))),
            ("Which number is smaller, {} or {}?", str(min(a, b))),
            ("Is {} greater than {}?", "yes" if a > b else "no"),
            ("Is {} less than {}?", "yes" if a < b else "no"),
        )
    )
    return [f"{a}<{b}", f"{b}<{a}"], [(form.format(a, b), answer)]


def _count(rng: Random) -> tuple[list[str], Turns]:
    text = sentence(rng, 1, 9)
    form = rng.choice(("Count the words: {}", "How many words are there: {}"))
    return [text], [(form.format(text), str(len(text.split())))]


def _reverse(rng: Random) -> tuple[list[str], Turns]:
    if rng.random() < 0.3:
        digits = "".join(rng.choices("123456789", k=rng.randint(2, 5)))
        return [digits], [(rng.choice(("Reverse the number {}.", "Write {} backwards.")).format(digits), digits[::-1])]
    text = sentence(rng, 2, 6)
    form = rng.choice(("Reverse the words: {}", "Say this backwards: {}"))
    return [text], [(form.format(text), " ".join(reversed(text.split())))]


def _repeat(rng: Random) -> tuple[list[str], Turns]:
    said = [sentence(rng, 1, 8)]
    forms = "Repeat after me: {}", "Repeat: {}", "Say: {}"
    turns = [(rng.choice(forms).format(said[0]), said[0])]
    while len(turns) < 4 and rng.random() < 0.6:
        match rng.randrange(3):
            case 0:
                turns.append((rng.choice(("Say that again.", "Again, please.")), turns[-1][1]))
            case 1:
                turns.append(("What did I say first?", said[0]))
            case 2:
                said.append(sentence(rng, 1, 8))
                turns.append((rng.choice(forms).format(said[-1]), said[-1]))
    return said, turns


TASKS: dict[str, Callable[[Random], tuple[list[str], Turns]]] = {
    "add": _add,
    "compare": _compare,
    "count": _count,
    "reverse": _reverse,
    "repeat": _repeat,
}
"""Each draws what is to be worked on, in all forms that come to the same, and the conversation about it."""


def text_conversation(rng: Random, task: str, held_out: bool = False) -> Turns:
    """Draws a conversation of one of `TASKS`, all of whose texts are held out, or none of them."""
    while True:
        texts, turns = TASKS[task](rng)
        if all(is_held_out(text) == held_out for text in texts):
            return turns


TRANSCRIBE = (
    "Transcribe the audio clip into text.",
    "Transcribe the audio.",
    "What is said in the recording?",
    "Write down what you hear.",
)
"""Instructions to write down a recording."""


def conversation_texts() -> list[str]:
    """Texts with every word that the templates above use, for the tokenizer."""
    rng = Random(0)
    drawn = [text for task in TASKS for _ in range(300) for turn in TASKS[task](rng)[1] for text in turn]
    return [*SYSTEM, *TRANSCRIBE, *drawn]
