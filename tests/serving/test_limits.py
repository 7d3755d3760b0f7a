"""What the server does not allow, and what it does when there is too much to do."""

import concurrent.futures
import contextlib
import json
import time

import httpx
import openai
import pytest

from phi4mm_jax.config import ConfigError
from phi4mm_jax.serving.backend import Backend
from phi4mm_jax.serving.settings import ServerSettings

SUM = [{"role": "user", "content": "What is 21 plus 84?"}]
BODY = {"model": "nano", "messages": SUM}
ENDLESS = {**BODY, "ignore_eos": True, "max_tokens": 1900}


@pytest.fixture(scope="module")
def narrow(start):
    """A server with one row."""
    with start(
        rows=1,
        max_waiting=2,
        max_body_bytes=20_000,
        api_key="secret",
        cors_origins=("https://a.example",),
        model_names=("tiny",),
    ) as server:
        yield server.url


@pytest.fixture
def http(narrow):
    with httpx.Client(base_url=narrow, timeout=60, headers={"Authorization": "Bearer secret"}) as http:
        yield http


@contextlib.contextmanager
def endless(http, body=ENDLESS):
    """An answer that has begun and goes on; gives its lines."""
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        while '"content": "1"' not in next(lines).replace('":"', '": "'):
            pass
        yield lines


def error(answer):
    return answer.status_code, answer.json()["error"]["code"]


def running(http):
    return http.get("/ready").json()["running"]


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@contextlib.contextmanager
def none_finishes(http):
    """Nothing runs in the end, and no answer has come to its own."""

    def finished():
        return [line for line in http.get("/metrics").text.split("\n") if line.startswith("phi4mm_answers_total")]

    before = finished()
    yield
    wait_until(lambda: not running(http))
    assert finished() == before


# --- who may ask ---------------------------------------------------------------------------------------------


def test_api_key(narrow, http):
    assert http.get("/v1/models").status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer é"}):
        headers = {name: value.encode() for name, value in headers.items()}
        for path in ("/v1/models", "/v1/nothing"):
            answer = httpx.get(narrow + path, headers=headers)
            assert error(answer) == (401, "invalid_api_key")
            assert answer.json()["error"]["type"] == "authentication_error"
        assert httpx.post(f"{narrow}/tokenize", headers=headers, json={"prompt": "a"}).status_code == 401
    for path in ("/health", "/ready", "/metrics", "/", "/docs"):
        assert httpx.get(narrow + path).status_code == 200
    with openai.OpenAI(base_url=f"{narrow}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError, match="Bearer KEY"):
            client.models.list()


def test_other_origins(http):
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    granted = httpx.options(f"{http.base_url}/v1/chat/completions".replace("//v1", "/v1"), headers=asked)
    assert granted.status_code == 200
    assert granted.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert "authorization" in granted.headers["Access-Control-Allow-Headers"].lower()
    refused = http.get("/v1/models", headers={"Origin": "https://b.example"})
    assert "Access-Control-Allow-Origin" not in refused.headers


def test_names(http, start):
    assert error(http.post("/v1/chat/completions", json=BODY)) == (404, "model_not_found")
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny"]
    assert http.post("/tokenize", json={"prompt": "a"}).status_code == 200  # whatever there is
    with start(any_model_name=True) as other:
        fields = {"model": "gpt-9", "prompt": "a"}
        assert httpx.post(f"{other.url}/tokenize", json=fields).status_code == 200


# --- how much they may ask -----------------------------------------------------------------------------------


def test_large_bodies(narrow, http):
    large = json.dumps({**BODY, "user": "x" * 20_000}).encode()
    headers = {"Content-Type": "application/json"}
    declared = http.post("/v1/chat/completions", content=large, headers=headers)
    assert error(declared) == (413, "too_large") and "0.02 MB" in declared.json()["error"]["message"]
    streamed = http.post("/v1/chat/completions", content=iter([large[:9000], large[9000:18_000], large[18_000:]]))
    assert error(streamed) == (413, "too_large")
    form = http.post("/v1/audio/transcriptions", files={"file": ("a.wav", b"x" * 20_000)})
    assert error(form) == (413, "too_large")
    assert http.get("/v1/models").status_code == 200


def test_one_request_cannot_ask_for_more_than_may_wait(http):
    answer = http.post("/v1/chat/completions", json={**BODY, "model": "tiny", "n": 3})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "n"


def test_a_full_queue(http):
    body = {**BODY, "model": "tiny"}
    with concurrent.futures.ThreadPoolExecutor(2) as threads, endless(http, {**ENDLESS, "model": "tiny"}):
        waiting = [threads.submit(http.post, "/v1/chat/completions", json=body) for _ in range(2)]
        wait_until(lambda: http.get("/ready").json()["waiting"] == 2)
        refused = http.post("/v1/chat/completions", json=body)
        assert error(refused) == (429, "queue_full")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["Retry-After"]) > 0
    # The endless one has been left, which is why those that waited come to their turn.
    assert [f.result().json()["choices"][0]["message"]["content"] for f in waiting] == ["105", "105"]


def test_time_limit(start):
    with start(request_timeout_s=0.7) as hasty, httpx.Client(base_url=hasty.url, timeout=60) as http:
        with none_finishes(http):
            whole = http.post("/v1/chat/completions", json=ENDLESS)
            assert error(whole) == (504, "timeout")
            assert whole.json()["error"]["message"] == "not finished within 0.7 s"
            streamed = http.post("/v1/chat/completions", json={**ENDLESS, "stream": True})
            last = streamed.text.strip().split("\n\n")[-1]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        with openai.OpenAI(base_url=f"{hasty.url}/v1", api_key="-", max_retries=0) as client:
            stream = client.chat.completions.create(**BODY, extra_body={"min_tokens": 1900}, stream=True)
            with pytest.raises(openai.APIError, match="not finished within 0.7 s"):
                list(stream)


# --- with others ---------------------------------------------------------------------------------------------


def test_more_requests_than_rows(server):
    def ask(i):
        body = {**BODY, "messages": [{"role": "user", "content": f"What is {20 + i} plus 30?"}], "stream": i % 2 == 0}
        answer = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=120)
        if i % 2:
            return answer.json()["choices"][0]["message"]["content"]
        events = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)

    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, range(12))) == [str(50 + i) for i in range(12)]


def test_a_client_that_goes_in_the_middle_of_a_stream(server):
    with httpx.Client(base_url=server, timeout=60) as http:
        with none_finishes(http), endless(http):
            assert running(http) == 1


def test_a_client_that_goes_while_it_waits(server):
    with httpx.Client(base_url=server, timeout=60) as http:
        with none_finishes(http), pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=ENDLESS, timeout=0.3)


# --- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70_000}, "port = 70000: expected 0 to 65535"),
        ({"rows": -1}, "rows = -1"),
        ({"max_waiting": 0}, "max_waiting = 0: must be positive"),
        ({"request_timeout_s": 0}, "request_timeout_s"),
        ({"model_names": ("",)}, "model_names"),
        ({"api_key": "ключ"}, "api_key = '...'"),
        ({"host": 5}, "host = 5"),
        ({"segment_s": 0.1}, "segment_s"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        ServerSettings(**settings)
    assert "secret" not in repr(ServerSettings(api_key="secret"))


def test_context(model):
    with pytest.raises(ConfigError, match="context = 5000: the model's own"):
        Backend(model, ServerSettings(context=5000))
    backend = Backend(model, ServerSettings(context=500, rows=2))
    assert (backend.capacity.rows, backend.capacity.context) == (2, 500)
    assert backend.capacity.length >= 500
    assert Backend(model, ServerSettings()).capacity.rows == 4


def test_what_memory_holds(model, monkeypatch):
    whole = Backend(model, ServerSettings()).capacity.context
    monkeypatch.setattr("phi4mm_jax.serving.capacity.available_memory", lambda device: 600 << 20)
    monkeypatch.setattr("phi4mm_jax.serving.capacity.plan_memory", lambda steps, rows, length: Plan(length))
    assert Backend(model, ServerSettings()).capacity.context < whole


class Plan:
    weights = 0

    def __init__(self, length):
        self.total = length << 18

    def check(self, available, weights_loaded):
        assert self.total <= available
