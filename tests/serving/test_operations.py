"""What the server says about itself, and token ids."""

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

SUM = [{"role": "user", "content": "What is 21 plus 84?"}]


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server, timeout=60) as http:
        yield http


def test_models(client, http):
    assert [model.id for model in client.models.list()] == ["nano", "default"]
    assert client.models.retrieve("nano").id == "nano"
    assert http.get("/v1/models/nano").json()["max_model_len"] > 1000
    with pytest.raises(openai.NotFoundError, match="nano, default"):
        client.models.retrieve("some/other")


def test_health(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json()["status"] == "ready"


def test_page_and_reference(http):
    assert "<html" in http.get("/").text
    assert http.get("/static/chat.js").status_code == 200
    assert http.get("/static/../app.py").status_code == 404
    paths = http.get("/openapi.json").json()["paths"]
    assert list(paths["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]) == ["multipart/form-data"]
    assert {"/v1/chat/completions", "/v1/audio/transcriptions", "/tokenize", "/metrics"} <= set(paths)
    assert http.get("/docs").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405), ("PUT", "/x", 404)],
)
def test_what_is_not_there(http, method, path, status):
    answer = http.request(method, path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")


def test_tokens(http):
    ids = http.post("/tokenize", json={"prompt": "<|user|>moon 7<|end|>", "return_token_strs": True}).json()
    assert ids["count"] == len(ids["tokens"]) and ids["token_strs"][0] == "<|user|>"
    assert http.post("/detokenize", json={"tokens": ids["tokens"]}).json() == {"prompt": "<|user|>moon 7<|end|>"}
    chat = http.post("/tokenize", json={"messages": SUM}).json()
    raw = http.post("/tokenize", json={"prompt": f"<|user|>{SUM[0]['content']}<|end|><|assistant|>"}).json()
    assert chat == raw
    for path, fields, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": SUM}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [1, 5000]}, "tokens[1]"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ):
        answer = http.post(path, json=fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def metrics(http):
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {(s.name.removeprefix("phi4mm_"), *s.labels.values()): s.value for s in samples}


def test_metrics(http):
    body = {"model": "nano", "messages": SUM}
    http.post("/v1/chat/completions", json=body)
    before = metrics(http)
    http.post("/v1/chat/completions", json=body | {"n": 2})
    http.post("/v1/chat/completions", json=body | {"top_p": 9})
    after = metrics(http)
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert grown["requests_total", "language"] == grown["answers_total", "stop"] == 2
    assert (grown["prompt_tokens_total",], grown["completion_tokens_total",]) == (26, 8)
    assert grown["cached_prompt_tokens_total",] >= 12
    assert grown["errors_total", "400", "invalid_request_error"] == 1
    counts = [grown[f"{name}_count",] for name in ("time_to_first_token_seconds", "request_seconds")]
    assert counts == [2, 2] and grown["inter_token_latency_seconds_count",] > 0
    assert 0 < grown["time_to_first_token_seconds_sum",] <= grown["request_seconds_sum",]
    assert (after["cache_rows",], after["requests_running",], after["cache_positions_used",]) == (4, 0, 0)
