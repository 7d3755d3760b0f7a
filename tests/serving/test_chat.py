"""Chat completions by OpenAI's own client, against answers that are known."""

import base64
import math
import re

import httpx
import openai
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


def ask(client, messages=SUM, **fields):
    return client.chat.completions.create(model="nano", messages=messages, **fields)


def text(client, messages=SUM, **fields):
    return ask(client, messages, **fields).choices[0].message.content


@pytest.fixture(scope="module")
def ids(server):
    """The token ids of a text."""
    return lambda prompt: httpx.post(f"{server}/tokenize", json={"prompt": prompt}).json()["tokens"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_answers(client, case):
    answer = ask(client, as_openai(case))
    assert answer.choices[0].message.content == case.expected
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.object, answer.model) == ("chat.completion", "nano")
    details = answer.usage.prompt_tokens_details
    assert (details.image_tokens > 0, details.audio_tokens > 0) == (bool(case.images), bool(case.audios))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_video_is_seen(client):
    (case,) = (case for case in CASES if case.expected == "moon")
    frames = ["data:image/png;base64," + b64(path) for path in case.images]
    parts = [{"type": "video", "video": frames}, {"type": "text", "text": case.prompt}]
    answer = ask(client, [{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == case.expected
    assert answer.usage.prompt_tokens_details.video_frames == len(frames)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_streams(client, case):
    *chunks, last = list(ask(client, as_openai(case), stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == case.expected
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) == last.usage.completion_tokens + 1  # the role, every token, the end
    assert {chunk.usage for chunk in chunks} == {None}
    assert last.choices == [] and last.usage.completion_tokens > 0
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_a_conversation(client):
    sentence = "small door what train one"
    messages = [
        {"role": "user", "content": f"Repeat after me: {sentence}"},
        {"role": "assistant", "content": sentence, "refusal": None},
        {"role": "user", "content": [{"type": "text", "text": "Say that again."}]},
    ]
    assert text(client, messages) == sentence
    again = ask(client, messages).usage
    assert again.prompt_tokens_details.cached_tokens == again.prompt_tokens - 1


def test_a_developer_is_the_system(server):
    ids = []
    for role in ("developer", "system"):
        messages = [{"role": role, "content": "Be brief."}, *SUM]
        ids.append(httpx.post(f"{server}/tokenize", json={"messages": messages}).json()["tokens"])
    assert ids[0] == ids[1]


def test_several_answers(client):
    answer = ask(client, n=3, temperature=20, seed=5, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) > 1
    assert text(client, temperature=20, seed=6, max_tokens=6) == texts[1]
    alone = ask(client, temperature=20, seed=5, max_tokens=6)
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in ask(client, n=3, temperature=20, seed=5, max_tokens=6, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, stream):
    answer = ask(client, logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        found = [t for chunk in answer if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content]
    else:
        found = answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in found) == b"105"
    for token in found:
        assert math.exp(token.logprob) > 0.5
        assert (token.top_logprobs[0].token, len(token.top_logprobs)) == (token.token, 2)
        assert token.top_logprobs[0].logprob == token.logprob > token.top_logprobs[1].logprob


def test_stop_and_limits(client, ids):
    cut = ask(client, stop=["5", "x"])
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("10", "stop")
    assert text(client, stop="0") == "1"
    for name in ("max_tokens", "max_completion_tokens"):
        short = ask(client, **{name: 2})
        assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("10", "length")
    assert ask(client, max_tokens=9, extra_body={"min_tokens": 9}).usage.completion_tokens == 9
    assert ask(client, max_tokens=9, extra_body={"ignore_eos": True}).choices[0].finish_reason == "length"


def test_what_changes_the_draw(client, ids):
    seven = ids("7")[0]
    assert text(client, logit_bias={seven: 100}, max_tokens=3) == "777"
    assert text(client, logit_bias={seven: 100}, max_tokens=3, frequency_penalty=2) == "777"
    assert text(client, logit_bias={seven: 5}, max_tokens=3).count("7") < 3
    hot = {"temperature": 50, "max_tokens": 8, "seed": 1}
    assert text(client, **hot) != "105"
    for narrow in ({"extra_body": {"top_k": 1}}, {"top_p": 1e-6}, {"extra_body": {"min_p": 1.0}}):
        assert text(client, **hot, **narrow) == "105"
    assert text(client, presence_penalty=-2, extra_body={"repetition_penalty": 1e-3}) != "105"


def test_neutral_fields_are_accepted(client):
    neutral = {
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "response_format": {"type": "text"},
        "prediction": {"type": "content", "content": "105"},
    }
    assert text(client, **neutral, extra_body={"tools": None, "logit_bias": None, "anything": None}) == "105"


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
REFUSED = [
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"temperature": -1}, "temperature", "at least 0"),
    ({"top_p": 0}, "top_p", "more than 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"stop": 5}, "stop", "valid string; or "),
    ({"stop": [""]}, "stop", "non-empty"),
    ({"logprobs": 5}, "logprobs", "boolean"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens", "context of 2"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "0 to 1023"),
    ({"seed": 2**70}, "seed", "at most"),
    ({"modalities": ["text", "audio"]}, "modalities[1]", "'text'"),
    ({"audio": {"voice": "alloy"}}, "audio", "not a field"),
    ({"functions": []}, "functions", "not a field"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [5]}, "messages[0]", "dictionary"),
    ({"messages": "Hi"}, "messages", "list"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "accepted: system"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "string or a list"),
    ({"messages": [*SUM, {"role": "user", "content": [{"type": "film"}]}]}, "messages[1].content[0].type", "accepted"),
    ({"messages": [{"role": "user", "content": [PICTURE]}]}, "messages[0].content[0].image_url.url", "picture|image"),
    ({"messages": [{"role": "user", "content": "x" * 5000}]}, "prompt", "more than the 2048 tokens"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED, ids=[str(case[0])[:50] for case in REFUSED])
def test_what_is_wrong_is_named(server, fields, param, message):
    answer = httpx.post(f"{server}/v1/chat/completions", json={"model": "nano", "messages": SUM, **fields}, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert re.search(message, error["message"])
    assert set(error) == {"message", "type", "param", "code"}


def test_local_files_and_private_hosts_are_off_limits(server):
    for url in ("/etc/hostname", "file:///etc/hostname", f"{server}/static/icon.svg"):
        part = {"type": "image_url", "image_url": {"url": url}}
        body = {"model": "nano", "messages": [{"role": "user", "content": [part]}]}
        answer = httpx.post(f"{server}/v1/chat/completions", json=body)
        assert answer.status_code == 400 and re.search("not allowed|not public", answer.json()["error"]["message"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model": "nano"', "not valid JSON"),
        (b"", "JSON object"),
        (b"[]", "JSON object"),
        (b'{"messages": [], "\\ud800": 1}', "unicode"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogates"),
        (b'{"messages": [{"role": "\\ud800", "content": "x"}]}', "accepted"),
        (b"[" * 200_000, "body"),
    ],
)
def test_bodies_that_are_no_requests(server, body, message):
    answer = httpx.post(f"{server}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_unknown_model(client):
    with pytest.raises(openai.NotFoundError, match="nano, default") as caught:
        client.chat.completions.create(model="gpt-9", messages=SUM)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
