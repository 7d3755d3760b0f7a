"""The bundled model truly hears, reads and answers, alone, side by side, streamed and across the rope switch."""

from pathlib import Path
from random import Random

import pytest

from phi4mm_jax.api import Phi4MM
from phi4mm_jax.cli import main
from phi4mm_jax.demo import Case, read_cases, run_demo
from tools.nano.evaluate import wrong_adapter
from tools.nano.vocabulary import sentence

CASES = read_cases(Path(__file__).parent / "heldout")
ADAPTED = [case for case in CASES if case.images or case.audios]


def share_right(model: Phi4MM, cases: list[Case]) -> float:
    outputs = model.generate([case.conversation for case in cases], max_tokens=48)
    return sum(output.text == case.expected for output, case in zip(outputs, cases, strict=True)) / len(cases)


def of(*titles: str) -> list[Case]:
    chosen = [case for case in CASES if case.title.startswith(titles)]
    assert chosen
    return chosen


def test_demo(nano: Phi4MM) -> None:
    lines: list[str] = []
    assert run_demo(nano, lines.append), "\n".join(lines)
    assert sum("differs" in line for line in lines) == 0


def test_demo_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "5 of 5 as expected" in out
    assert not err


def test_nano_is_a_model_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", "nano", "--quiet", "Repeat after me: the red apple"]) == 0
    assert capsys.readouterr().out == "the red apple\n"


@pytest.mark.parametrize(
    ("titles", "least"),
    [
        (("text",), 0.95),
        (("speech: known",), 0.6),
        (("reading: one, large", "reading: one, small"), 0.9),
        (("reading: two",), 0.8),
        (("figure",), 0.8),
        (("spoken question",), 0.9),
    ],
    ids=["text", "speech", "a word", "two words", "figures", "spoken questions"],
)
def test_held_out_answers(nano: Phi4MM, titles: tuple[str, ...], least: float) -> None:
    assert share_right(nano, of(*titles)) >= least


def test_the_wrong_adapter_knows_nothing(nano: Phi4MM) -> None:
    with wrong_adapter():
        assert share_right(nano, of("speech", "reading", "figure")) <= 0.1


def test_rows_of_all_kinds_answer_as_they_do_alone(nano: Phi4MM) -> None:
    cases = [CASES[0], *ADAPTED[::6]]
    alone = [nano.generate(case.conversation, max_tokens=48).token_ids for case in cases]
    together = nano.generate([case.conversation for case in cases], max_tokens=48)
    assert [output.token_ids for output in together] == alone


def test_an_int8_cache_changes_no_answer() -> None:
    cases = [*of("text")[::4], *ADAPTED[::6]]
    exact, rounded = (
        Phi4MM.from_pretrained("nano", dtypes={"kv_cache": kv_cache}, progress=False).generate(
            [case.conversation for case in cases], max_tokens=48
        )
        for kv_cache in ("float32", "int8")
    )
    assert [output.text for output in rounded] == [output.text for output in exact]


def test_stream_gives_the_answer_word_by_word(nano: Phi4MM) -> None:
    conversation = [{"role": "user", "content": "Repeat after me: the small bird sees my red house"}]
    pieces = [piece.text for piece in nano.stream(conversation)]
    assert len([piece for piece in pieces if piece]) >= 6
    assert "".join(pieces) == nano.generate(conversation).text


def test_stop_string_ends_an_answer(nano: Phi4MM) -> None:
    conversation = [{"role": "user", "content": "Repeat after me: the small bird sees the red house"}]
    output = nano.generate(conversation, stop=[" sees"])
    assert (output.text, output.finish_reason) == ("the small bird", "stop")


def test_answer_across_the_rope_switch(nano: Phi4MM) -> None:
    limit = nano.processor.config.text.original_max_position_embeddings
    rng = Random(0)
    conversations, said = [], []
    for _ in range(20):
        *before, last = (sentence(rng, 7, 7) for _ in range(6))
        messages = [
            {"role": role, "content": content}
            for text in before
            for role, content in (("user", f"Repeat after me: {text}"), ("assistant", text))
        ]
        conversations.append([*messages, {"role": "user", "content": f"Repeat after me: {last}"}])
        said.append(last)
    outputs = nano.generate(conversations)
    for output in outputs:
        assert output.usage.prompt_tokens <= limit < output.usage.prompt_tokens + output.usage.completion_tokens
    assert sum(output.text == text for output, text in zip(outputs, said, strict=True)) >= 12
