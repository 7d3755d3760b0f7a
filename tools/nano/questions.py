"""Written questions about pictures, with the pictures and the right answers."""

from __future__ import annotations

from random import Random

from tools.nano.marks import Picture
from tools.nano.pictures import TILE, figure_picture, text_picture
from tools.nano.vocabulary import WORDS

READ = {
    "text": (
        "Read the text in the image.",
        "What is written in the picture?",
        "What is written here?",
        "What does the picture say?",
    ),
    "colour": ("What colour is the figure?", "Name the colour of the shape.", "What colour is it?"),
    "shape": ("What shape is it?", "Name the shape.", "Which figure is in the picture?"),
    "both": ("Name the colour and the shape.", "Describe the figure.", "What is in the picture?"),
}
"""Questions about one picture. "What is in the picture?" is asked of figures alone."""

READ_ONE_OF_TWO = {
    "first": ("What is in the first picture?", "Describe the first image."),
    "second": ("What is in the second picture?", "Describe the second image."),
    "each": ("What is in each picture?", "Describe both images."),
}
"""Questions about two pictures; the answer to "each" has both descriptions, joined by " and "."""


def ask_about_one(rng: Random, hardest: float, tiles: tuple[int, int]) -> tuple[list[Picture], str, str]:
    """Draws a picture (see `random_picture`), a question about it, and the answer."""
    picture = random_picture(rng, hardest, tiles)
    kind = "text" if picture.text else rng.choice(("colour", "shape", "both"))
    return [picture], rng.choice(READ[kind]), answer_about(picture, kind)


def ask_about_two(rng: Random, hardest: float) -> tuple[list[Picture], str, str]:
    """Draws two pictures of a tile each, a question about one or both, and the answer."""
    shown = [random_picture(rng, hardest, (1, 1)) for _ in range(2)]
    both = [answer_about(picture, "text" if picture.text else "both") for picture in shown]
    kind = rng.choice(tuple(READ_ONE_OF_TWO))
    answer = {"first": both[0], "second": both[1], "each": " and ".join(both)}[kind]
    return shown, rng.choice(READ_ONE_OF_TWO[kind]), answer


def answer_about(picture: Picture, kind: str) -> str:
    """What a picture shows: its "text", or its figure's "colour", "shape" or "both"."""
    if kind == "text":
        return picture.text
    colour, shape = picture.figure
    return {"colour": colour, "shape": shape, "both": f"{colour} {shape}"}[kind]


def random_picture(
    rng: Random, hardest: float, tiles: tuple[int, int], pairs: float = 0.4, numbers: float = 0.3
) -> Picture:
    """Draws a picture of print or of a figure.

    Args:
      rng: the source of all chance.
      hardest: bound of the difficulty, from 0 to 1.
      tiles: most tiles across and down.
      pairs: share of two words or numbers in print that is not of the easiest.
      numbers: share of numbers among what is printed.
    """
    largest = tuple(TILE * n for n in tiles)
    while True:
        difficulty = rng.random() * hardest
        if rng.random() < 0.25:
            picture = figure_picture(rng, difficulty, largest)
        else:
            count = 2 if rng.random() < pairs * min(4 * hardest, 1) else 1
            picture = text_picture(rng, [random_print(rng, numbers) for _ in range(count)], difficulty, largest)
        if fits(picture, largest):
            return picture


def random_print(rng: Random, numbers: float = 0.3) -> str:
    """Draws a word of the vocabulary or, this often, a number from 0 to 99."""
    return str(rng.randrange(10 ** rng.randint(1, 2))) if rng.random() < numbers else rng.choice(WORDS)


def fits(picture: Picture, largest: tuple[int, int]) -> bool:
    """Whether a picture is no larger than it was meant to be."""
    return all(n <= most for n, most in zip(picture.image.size, largest, strict=True))
