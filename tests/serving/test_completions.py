"""Plain completions, by OpenAI's client."""

import httpx
import openai
import pytest

SUM = "<|user|>What is 21 plus 84?<|end|><|assistant|>"
OTHER = "<|user|>What is 20 plus 5?<|end|><|assistant|>"


def ask(client, prompt=SUM, **fields):
    return client.completions.create(model="nano", prompt=prompt, **fields)


def texts(answer):
    return [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]


@pytest.fixture(scope="module")
def ids(server):
    return lambda prompt: httpx.post(f"{server}/tokenize", json={"prompt": prompt}).json()["tokens"]


def test_forms_of_prompts(client, ids):
    answer = ask(client)
    assert texts(answer) == ["105"]
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("text_completion", "nano", "stop")
    assert texts(ask(client, ids(SUM))) == ["105"]
    assert texts(ask(client, [SUM, OTHER])) == ["105", "25"]
    both = ask(client, [ids(SUM), ids(OTHER)], n=2)
    assert texts(both) == ["105", "105", "25", "25"]
    assert both.usage.prompt_tokens == len(ids(SUM)) + len(ids(OTHER))


def test_a_prompt_goes_on(client, ids):
    assert texts(ask(client, SUM + "10")) == ["5"]
    assert texts(ask(client, SUM, max_tokens=2)) == ["10"]
    assert ask(client, extra_body={"ignore_eos": True}).usage.completion_tokens == 16
    assert (
        texts(ask(client, SUM, extra_body={"grammar": {"type": "regex", "value": "[a-e]{3}"}}))[0].strip("abcde") == ""
    )


def test_echo(client, ids):
    assert texts(ask(client, echo=True)) == [SUM + "105"]
    assert texts(ask(client, ids(SUM), echo=True)) == [SUM + "105"]
    assert "".join(chunk.choices[0].text for chunk in ask(client, echo=True, stream=True)) == SUM + "105"


def test_streams(client):
    found = {0: "", 1: "", 2: "", 3: ""}
    reasons = {}
    stream = ask(client, [SUM, OTHER], n=2, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    for chunk in chunks:
        choice = chunk.choices[0]
        found[choice.index] += choice.text
        reasons |= {choice.index: choice.finish_reason} if choice.finish_reason else {}
    assert found == {0: "105", 1: "105", 2: "25", 3: "25"}
    assert reasons == dict.fromkeys(range(4), "stop")
    assert last.usage == ask(client, [SUM, OTHER], n=2).usage or last.usage.completion_tokens == 14


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, stream):
    answer = ask(client, logprobs=2, stream=stream)
    parts = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
    parts = [part for part in parts if part and part.tokens]
    assert [token for part in parts for token in part.tokens] == ["1", "0", "5"]
    assert [offset for part in parts for offset in part.text_offset] == [0, 1, 2]
    chosen = [value for part in parts for value in part.token_logprobs]
    assert all(-0.7 < value < 0 for value in chosen)
    assert [max(top.values()) for part in parts for top in part.top_logprobs] == chosen


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a"] * 300}, "n"),
        ({"logprobs": 30}, "logprobs"),
        ({"prompt": "<|image_1|>"}, None),
        ({"prompt": [5000]}, None),
        ({"prompt": [[]]}, None),
    ],
)
def test_what_cannot_be_had_is_refused(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "nano", "prompt": "x", **fields})
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
