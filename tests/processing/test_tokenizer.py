import json
import random
import re
from pathlib import Path

import pytest
import tokenizers

from phi4mm_jax.processing.prompt import PromptError
from phi4mm_jax.processing.tokenizer import Control, Tokenizer


@pytest.fixture(scope="module", params=["toy", "released"])
def pair(request: pytest.FixtureRequest, golden: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Ours, and the tokenizers package with the whole file as the reference."""
    directory = golden if request.param == "toy" else request.getfixturevalue("released_tokenizer_directory")
    reference = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return Tokenizer.from_checkpoint(directory), reference


PIECES = [
    *(" ", "\n", "\r\n", "\t", "\x1c", "\x85", "\u2003", "\u3000", "\u200b", "  x", "/path//", "\0", "\ufffd"),
    *("Hi", "it's", "DON'T", "123456", "é", "e\u0301", "你好", "😀"),
    *("<|", "|>", "<|end", "|end|>", "<|image_1|>", "<|endoftext98|>"),
]


def random_texts(tokenizer: Tokenizer, count: int) -> list[str]:
    generator = random.Random(0)
    pieces = PIECES + list(tokenizer.control_ids)
    return ["".join(generator.choices(pieces, k=generator.randint(0, 12))) for _ in range(count)]


def test_live_control_tokens_as_in_the_reference(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, reference = pair
    for text in random_texts(ours, 500):
        assert ours.encode(text, allow_special=True) == reference.encode(text).ids, repr(text)


def test_text_cannot_forge_control_tokens(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, _ = pair
    control = set(ours.control_ids.values())
    for text in [*random_texts(ours, 500), *ours.control_ids, "".join(ours.control_ids)]:
        ids = ours.encode(text, allow_special=False)
        assert control.isdisjoint(ids), repr(text)
        assert ours.decode(ids, skip_special=False) == text


def test_decode_as_the_reference(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, reference = pair
    generator = random.Random(1)
    size = reference.get_vocab_size() + 40  # the embedding has rows without a token
    sequences = [[generator.randrange(size) for _ in range(12)] for _ in range(300)]
    sequences += [reference.encode(text).ids for text in random_texts(ours, 200)]
    for ids in sequences:
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == reference.decode(ids, skip_special_tokens=skip), ids


def test_stream_gives_whole_characters(pair: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, _ = pair
    text = "Grüße, 你好, привет 👩‍👩‍👧‍👦 naïve \U0001f9ff end"
    ids = ours.encode(text, allow_special=False)
    stream = ours.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces.count("") > 0  # something was held back


def test_stream_ends_within_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀", allow_special=False)
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids[:-1]) == "a"
    assert stream.finish() == "\ufffd"


def test_tool_tokens_survive_decoding(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|assistant|><|tool_call|>[]<|/tool_call|><|end|>", allow_special=True)
    assert tokenizer.decode(ids) == "<|tool_call|>[]<|/tool_call|>"


def test_space_after_control_tokens(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("Hi", allow_special=False)
    assert tokenizer.encode_parts([Control("<|user|>"), "\n Hi"]) == [503, *plain]
    assert tokenizer.encode_parts([Control("<|user|>"), " \n"]) == [503]
    assert tokenizer.encode_parts([Control("<|endoftext|>"), " "]) == [505, *tokenizer.encode(" ", allow_special=False)]


def test_oracle_cases(oracle: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(oracle / "ckpt_hub")
    for case in json.loads((oracle / "data" / "tokenizer_cases.json").read_text())["cases"]:
        if "ids" in case and not case["image_counts"]:
            assert tokenizer.encode(case["text"], allow_special=True) == case["ids"]
            assert tokenizer.decode(case["ids"], skip_special=False) == case["decoded"]


def test_errors(tokenizer: Tokenizer, golden: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no control token <.nonsense.>"):
        tokenizer.encode_parts([Control("<|nonsense|>")])
    with pytest.raises(PromptError, match="surrogates"):
        tokenizer.encode("\ud800", allow_special=False)
    with pytest.raises(PromptError, match="tokenizer.json: cannot be read"):
        Tokenizer.from_checkpoint(tmp_path)
    for definition in ("", "[]", "{}", '{"added_tokens": []}'):
        with pytest.raises(PromptError, match="^tokenizer.json: not a usable tokenizer"):
            Tokenizer(definition)
    data = json.loads((golden / "tokenizer.json").read_text())
    data["added_tokens"][0]["lstrip"] = True
    with pytest.raises(PromptError, match=r"added_tokens\[0\]\.lstrip: is not supported"):
        Tokenizer(json.dumps(data))


@pytest.mark.parametrize(
    "added, message",
    [
        (None, "added_tokens: expected a list"),
        (5, "added_tokens: expected a list"),
        (["x"], r"added_tokens\[0\]: expected an object, got 'x'"),
        ([{}], r"added_tokens\[0\]\.content: expected str, got None"),
        ([{"content": "a", "id": 1}], r"added_tokens\[0\]\.special: expected bool, got None"),
        ([{"content": 5, "id": 1}], r"added_tokens\[0\]\.content: expected str, got 5"),
        ([{"content": "a", "id": "1" * 1000}], r"added_tokens\[0\]\.id: expected int, got '1+\.\.\.1+'"),
    ],
)
def test_added_tokens_are_checked(golden: Path, tmp_path: Path, added: object, message: str) -> None:
    data = json.loads((golden / "tokenizer.json").read_text()) | {"added_tokens": added}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PromptError, match=f"^{re.escape(str(path))}: not a usable tokenizer .{message}"):
        Tokenizer.from_checkpoint(tmp_path)
