"""Chat completions by OpenAI's own client, against answers that are known."""

import base64

import pytest

from phi4mm_jax.demo import read_cases

SUM = [{"role": "user", "content": "What is 21 plus 84?"}]
CASES = read_cases()


def as_openai(case):
    """The messages of a case with its media as OpenAI's clients send them."""
    parts = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + b64(path), "detail": "high"}}
        for path in case.images
    ]
    parts += [{"type": "input_audio", "input_audio": {"data": b64(path), "format": "wav"}} for path in case.audios]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": case.prompt}]}]


def b64(path):
    return base64.b64encode(path.read_bytes()).decode()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_answers(client, case):
    answer = client.chat.completions.create(model="nano", messages=as_openai(case))
    assert answer.choices[0].message.content == case.expected
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.object, answer.model) == ("chat.completion", "nano")
    details = answer.usage.prompt_tokens_details
    assert (details.image_tokens > 0, details.audio_tokens > 0) == (bool(case.images), bool(case.audios))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_streams(client, case):
    stream = client.chat.completions.create(
        model="nano", messages=as_openai(case), stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == case.expected
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) == last.usage.completion_tokens + 1  # the role, every token, the end
    assert {chunk.usage for chunk in chunks} == {None}
    assert last.choices == [] and last.usage.completion_tokens > 0
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
