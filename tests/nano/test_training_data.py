"""What phi4mm-nano is trained on: the very tokens and features that the runtime makes, and nothing that is held out."""

import dataclasses
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from phi4mm_jax.config import ModelConfig
from phi4mm_jax.processing.images import image_features
from phi4mm_jax.processing.processor import Processor
from phi4mm_jax.processing.tokenizer import Tokenizer
from phi4mm_jax.weights.hub import BUNDLED
from tools.nano import batches, conversations, questions, vocabulary
from tools.nano.batches import Run, TextBatches, Writer, image_arrays, label_arrays
from tools.nano.marks import IGNORED, LABELS, Picture, patch_labels
from tools.nano.recordings import text_of
from tools.nano.tokenizer import tokenizer_files

CONFIG = ModelConfig.load("nano")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(json.dumps(tokenizer_files(CONFIG)["tokenizer.json"]))


@pytest.fixture
def run(tokenizer: Tokenizer, tmp_path: Path) -> Run:
    return Run("text", CONFIG, tokenizer, tmp_path, steps=100, seed=3)


def answers(messages: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in messages
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def test_every_word_is_one_token_and_any_text_goes_through(tokenizer: Tokenizer) -> None:
    for word in vocabulary.WORDS:
        assert [len(tokenizer.encode(form, allow_special=False)) for form in (word, f" {word}")] == [1, 1]
    odd = "Zebra\u00e9 \u6f22 42 <|end|>"
    assert tokenizer.decode(tokenizer.encode(odd, allow_special=False)) == odd


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_is_the_shipped_one(name: str) -> None:
    assert json.loads((BUNDLED["nano"] / name).read_text()) == tokenizer_files(CONFIG)[name]


@pytest.mark.parametrize("task", conversations.TASKS)
def test_text_rows_are_what_the_runtime_makes(run: Run, task: str) -> None:
    turns = conversations.text_conversation(Random(5), task)
    messages = [{"role": "system", "content": "Answer briefly."}, *answers(turns)]
    prompt = Processor(CONFIG, run.tokenizer).conversation(messages, add_generation_prompt=False)
    row = Writer(run).row(turns, system="Answer briefly.")
    np.testing.assert_array_equal(prompt.token_ids, [*row, CONFIG.tokens.pad])


def test_media_rows_are_what_the_runtime_makes(run: Run) -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (60, 150, 3), np.uint8))
    clip = (rng.standard_normal(9000).astype(np.float32) * 0.1, 16_000)
    parts = [{"type": "image", "image": picture}, {"type": "audio", "audio": clip}, {"type": "text", "text": "Say it."}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "seven"}]
    prompt = Processor(CONFIG, run.tokenizer).conversation(messages, add_generation_prompt=False)
    images, audios = prompt.images[0].num_tokens, prompt.audios[0].num_tokens
    row = Writer(run).row([("Say it.", "seven")], images=images, audios=audios)
    np.testing.assert_array_equal(prompt.token_ids, [*row, CONFIG.tokens.pad])


def test_only_answers_are_targets(run: Run) -> None:
    turns = [("Say: red cat", "red cat"), ("Say that again.", "red cat"), ("What did I say first?", "red cat")]
    writer = Writer(run)
    rows = [writer.row(turns, system="Answer briefly."), writer.row(turns[:1])]
    batch = writer.batch(rows, 64, Random(0))
    expected = ["red cat<|end|>" * 3, "red cat<|end|>"]
    predicted = [
        run.tokenizer.decode(tokens[targets], skip_special=False)
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True)
    ]
    assert predicted == expected


def test_batches_depend_on_seed_and_index_alone(run: Run) -> None:
    first, again = (TextBatches(run, add=1, reverse=2)(7) for _ in range(2))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    other = TextBatches(dataclasses.replace(run, seed=4), add=1, reverse=2)(7)
    assert first.tokens.shape != other.tokens.shape or (first.tokens != other.tokens).any()


def test_held_out_texts_are_never_trained_on() -> None:
    rng = Random(0)
    for task in conversations.TASKS:
        trained, held_out = (
            {turns[0] for turns in (conversations.text_conversation(rng, task, held) for _ in range(300))}
            for held in (False, True)
        )
        assert held_out and not trained & held_out
    assert not any(vocabulary.is_held_out(text_of(0, i)[1]) for i in (*range(500), *range(30_000, 30_200)))


def test_sentences_use_the_vocabulary_alone() -> None:
    rng = Random(0)
    said = [vocabulary.sentence(rng, 3, 8) for _ in range(500)]
    said += [vocabulary.question(rng, kind) for kind in vocabulary.QUESTION_KINDS for _ in range(50)]
    assert {word for text in said for word in text.split()} <= set(vocabulary.WORDS)
    assert all(3 <= len(text.split()) <= 8 for text in said[:500])
    assert [vocabulary.number_in_words(n) for n in (0, 13, 20, 42, 99)] == (
        ["zero", "thirteen", "twenty", "forty two", "ninety nine"]
    )


def test_patch_labels_follow_the_crops() -> None:
    side, patch = CONFIG.vision.image_size, CONFIG.vision.patch_size
    # Two tiles; the mark lies in the second patch row and the third patch column of the right one.
    box = (side + 2 * patch, patch, side + 3 * patch, 2 * patch)
    picture = Picture(Image.new("RGB", (2 * side, side - patch)), "a", None, ((LABELS["a"], *box),), 24.0, True)
    labels = patch_labels(picture, CONFIG.vision)
    features = image_features(picture.image, CONFIG.vision)
    assert labels.shape == (3, 64)
    np.testing.assert_array_equal(labels == IGNORED, ~features.mask.reshape(3, -1))
    assert np.argwhere(labels[1:] == LABELS["a"]).tolist() == [[1, 8 + 2]]
    assert np.argwhere(labels[0] == LABELS["a"]).ravel().tolist() == [8 + 5]  # squeezed to half its width


def cells_of(run: Run, picture: Picture) -> dict[int, tuple[str, ...]]:
    """What the trainer wants the cells of a picture's global view to say, those left out that say nothing."""
    image = image_features(picture.image, CONFIG.vision)
    arrays = label_arrays(run, [picture], [image], 8)
    named, naming = arrays["named"], arrays["naming"]
    assert named.shape == naming.shape == (8 * 16, 2)
    assert not naming[len(image.crops) * 16 :].any()  # padding
    return {
        cell: tuple(run.tokenizer.decode([t]).strip() for t, weight in zip(*pair, strict=True) if weight == 1)
        for cell, pair in enumerate(zip(named[:16], naming[:16], strict=True))
        if (pair[1] == 1).any()
    }


def test_cells_say_what_they_show_where_it_begins(run: Run) -> None:
    side = CONFIG.vision.image_size
    blank = Image.new("RGB", (side, side))  # 4 x 4 cells of 28 pixels
    boxes = [(2.0, 2.0, 26.0, 26.0), (30.0, 2.0, 54.0, 26.0), (2.0, 60.0, 26.0, 82.0), (30.0, 60.0, 54.0, 82.0)]

    def picture(text: str, boxes: list[tuple[float, ...]]) -> Picture:
        marks = tuple((LABELS[c], *box) for c, box in zip(text.replace(" ", ""), boxes, strict=True))
        return Picture(blank, text, None, marks, 24.0, True)

    assert cells_of(run, picture("on in", boxes)) == {0: ("on",), 8: ("in",)}
    assert cells_of(run, picture("42 7", boxes[:3])) == {0: ("4",), 1: ("2",), 8: ("7",)}
    close = [(2.0, 2.0, 13.0, 26.0), (15.0, 2.0, 26.0, 26.0)]
    assert cells_of(run, picture("42", close)) == {0: ("4", "2")}
    heart = Picture(blank, "", ("red", "heart"), ((LABELS["heart"], 30.0, 30.0, 82.0, 82.0),), 0.0, True)
    assert cells_of(run, heart) == {5: ("red",), 6: ("heart",)}
    small = Picture(blank, "", ("red", "heart"), ((LABELS["heart"], 30.0, 30.0, 54.0, 54.0),), 0.0, True)
    assert cells_of(run, small) == {5: ("red", "heart")}


def test_a_picture_of_one_tile_is_seen_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 + 1 + 2 + 7 + 7 + 7 + 7 crops; one more picture does not fit.
    sizes = iter(((112, 112), (112, 112), (60, 112), (300, 200), *[(336, 224)] * 4))

    def draw(*_: object, **__: object) -> Picture:
        return Picture(
            Image.new("RGB", next(sizes)), "", ("red", "heart"), ((LABELS["heart"], 1, 1, 40, 40),), 0.0, True
        )

    monkeypatch.setattr(batches, "random_picture", draw)
    batch = batches.SeeingBatches(run, rise=0.5)(0)
    assert not list(sizes)
    assert batch.labels.shape == batch.prints.shape == (32, 64)
    assert (batch.labels != IGNORED).any(axis=1).all()


@pytest.mark.parametrize("tiles", [(1, 1), (3, 2)])
def test_pictures_are_no_larger_than_meant(tiles: tuple[int, int]) -> None:
    rng = Random(0)
    try:
        sizes = [questions.random_picture(rng, 1.0, tiles).image.size for _ in range(1500)]
    except FileNotFoundError as error:
        pytest.skip(str(error))  # fonts
    assert max(width for width, _ in sizes) <= 112 * tiles[0]
    assert max(height for _, height in sizes) <= 112 * tiles[1]


def test_image_index_points_into_padded_crops(run: Run) -> None:
    rng = np.random.default_rng(0)
    images = [
        [image_features(Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)), CONFIG.vision) for h, w in sizes]
        for sizes in (((112, 112),), ((112, 224), (50, 60)))
    ]
    writer = Writer(run)
    rows = [writer.row([("Say it.", "red")], images=sum(i.num_tokens for i in row)) for row in images]
    batch = writer.batch(rows, 256, Random(0))
    arrays = image_arrays(CONFIG, batch.tokens, images, 12)
    assert arrays["crops"].shape == (12, 3, 112, 112)
    index = arrays["image_index"]
    np.testing.assert_array_equal(index >= 0, batch.tokens == CONFIG.tokens.image)
    # The last picture's global view is crop 5: its first token follows the 80 of the crops before it.
    view = images[1][1].layout
    last = index[1][index[1] >= 0][-len(view) :]
    np.testing.assert_array_equal(last[view >= 0], 80 + view[view >= 0])
    assert set(last[view < 0]) == {12 * 16, 12 * 16 + 1}
