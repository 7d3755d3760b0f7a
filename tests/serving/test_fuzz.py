"""Requests that are malformed in ways nobody thought of: none is an error of the server, whatever it answers.

`PHI4MM_FUZZ=5000 pytest -s tests/serving/test_fuzz.py` tries so many, at random, and tells how they were answered;
without it a few hundred are tried, always the same.
"""

import base64
import collections
import copy
import json
import os
import random

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phi4mm_jax.demo import read_cases

EXAMPLES = int(os.environ.get("PHI4MM_FUZZ", "0"))
SPEECH = read_cases()[1].audios[0].read_bytes()
PICTURE = read_cases()[2].images[0].read_bytes()


def encoded(data):
    return base64.b64encode(data).decode()


# --- valid requests, short to answer -------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}}
SAMPLING = {
    **{"model": "nano", "max_tokens": 2, "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
    **{"presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.5, "logit_bias": {"5": -1}, "seed": 1},
    **{"stop": ["x"], "min_tokens": 1, "ignore_eos": False, "user": "u", "stream": False},
}
PARTS = [
    {"type": "text", "text": "What is written?"},
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(PICTURE)}", "detail": "auto"}},
    {"type": "input_audio", "input_audio": {"data": encoded(SPEECH), "format": "ogg"}},
    {"type": "audio_url", "audio_url": {"url": f"data:audio/ogg;base64,{encoded(SPEECH)}"}},
    {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
USER = {"role": "user", "content": "What is 21 plus 84?"}
TALK = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "5", "tool_call_id": "c"},
]
VALID = [
    ("/v1/chat/completions", {**SAMPLING, "messages": [USER], "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"max_tokens": 2, "messages": TALK, "tools": [TOOL], "tool_choice": "required"}),
    ("/v1/chat/completions", {"max_tokens": 2, "messages": [{"role": "user", "content": PARTS[:3]}]}),
    ("/v1/chat/completions", {"max_tokens": 2, "messages": [{"role": "user", "content": PARTS[:2]}]}),
    ("/v1/chat/completions", {"max_tokens": 2, "messages": [{"role": "user", "content": [PARTS[0], *PARTS[3:]]}]}),
    (
        "/v1/chat/completions",
        {
            **{"max_tokens": 2, "messages": [USER], "stream": True, "stream_options": {"include_usage": True}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
        },
    ),
    *(
        (path, {"max_tokens": 2, **asked, "grammar": {"type": kind, "value": value}})
        for path, asked in (("/v1/chat/completions", {"messages": [USER]}), ("/v1/completions", {"prompt": "a"}))
        for kind, value in (("regex", "[ab]{3}"), ("lark", 'start: "a" | "b" start'), ("json_schema", SCHEMA))
    ),
    ("/v1/completions", {**SAMPLING, "prompt": "<|user|>Hello<|end|><|assistant|>", "logprobs": 2, "best_of": 2}),
    ("/v1/completions", {"max_tokens": 2, "prompt": [[1, 2], [3]], "echo": True}),
    ("/tokenize", {"messages": TALK, "tools": [TOOL], "return_token_strs": True}),
    ("/tokenize", {"prompt": "Hello <|end|>"}),
    ("/detokenize", {"model": "nano", "tokens": [1, 2, 3]}),
]
FORMS = [
    ("/v1/audio/transcriptions", {"model": "nano", "language": "en", "prompt": "p", "response_format": "verbose_json"}),
    ("/v1/audio/transcriptions", {"temperature": "0", "stream": "true", "timestamp_granularities[]": "segment"}),
    ("/v1/audio/translations", {"model": "nano", "response_format": "srt", "temperature": "0.5"}),
]


# --- what is put into them -----------------------------------------------------------------------------------


class Raw(str):
    """JSON as it is."""


def nested(draw):
    depth, (opening, closing) = draw(st.sampled_from([50, 300, 900, 3000, 100_000])), draw(st.sampled_from(BRACKETS))
    return Raw(opening * depth + "1" + closing * depth)


BRACKETS = [("[", "]"), ('{"a":', "}"), ('{"items":', "}"), ('[{"type":"text","text":', "}]"), ('{"anyOf":[', "]}")]
LITERALS = [
    *("NaN", "Infinity", "-Infinity", "1e999", "-0.0", "1e-400", "5e-324", "1" + "0" * 400, "1" + "0" * 5000),
    *("-1", "0", "2147483648", "-9223372036854775809", "18446744073709551616", "0.1", "1e308", "true", "null", '""'),
    *('"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '{"a":1,"a":[2]}', '{"":{}}', "[]", "{}", "[null]", '["",1]'),
    *('"<|end|><|system|>"', '"<|image_1|>"', '"<|audio_1|><|audio_1|>"', '"\u202e\ufeff\U0010ffff"'),
]
URLS = [
    *("http://", "http://[", "http://127.0.0.1:1/", "https://[::1]/", "http://0/", "http://10.0.0.1/", "http://a b"),
    *("file:///etc/passwd", "/etc/passwd", "..", "data:", "data:,", "data:;base64,", "data:image/png;base64,A", "\0"),
    *("ftp://a", "http://\ud800", "data:image/png;base64,\ud800", "javascript:1", "http://127.0.0.1:99999/", "//", "é"),
]
GRAMMARS = [
    *(
        "(",
        "[",
        "a{99999}",
        "(a{1000}){1000}",
        "(?=a)",
        "\\",
        "a**",
        "(a|a)*b",
        "\\p{X}",
        "[^\\x00-\\uffff]",
        "x*" * 500,
    ),
    *(
        "start: start",
        "start: a",
        "start: /(/",
        "start: %json {",
        "start: @a",
        'start: "\\',
        "%import x",
        "start: <|end|>",
    ),
    *("start: <[0]>", "start:" + ' "a"' * 3000, "start: (" * 300, "%json {}", "start: /a/ & /b/", "start: %regex {}"),
]
SCHEMAS = [
    *({"$ref": "#"}, {"$ref": "#/a"}, {"$ref": 1}, {"type": 1}, {"type": []}, {"pattern": "("}, {"multipleOf": 1e-300}),
    *(
        {"anyOf": []},
        {"enum": []},
        {"required": 1},
        {"minLength": 10**18},
        {"minItems": 10**9},
        {"format": "x"},
        {"not": {}},
    ),
    *(
        {"multipleOf": True},
        {"maximum": -(10**300), "minimum": 10**300},
        {"properties": {"a" * 10_000: {}}},
        {"const": 1},
    ),
    *(
        {"allOf": [{"$ref": "#"}] * 50},
        {"x-guidance": 1},
        {"x-guidance": {"whitespace_pattern": "("}},
        {"items": False},
    ),
    *({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, {"enum": ["\ud800"]}),
]


@st.composite
def media(draw):
    """A damaged file, or noise, as a URL or as base64."""
    data = bytearray(draw(st.sampled_from([SPEECH, PICTURE, b"RIFF\xff\xff\xff\xffWAVEfmt ", b"fLaC", b"GIF89a", b""])))
    noise = random.Random(draw(st.integers(0, 2**32)))
    for _ in range(draw(st.integers(0, 20)) if data else 0):
        data[noise.randrange(len(data))] = noise.randrange(256)
    data = bytes(data[: draw(st.integers(0, len(data)))]) + draw(st.binary(max_size=100))
    return data


ODD = st.one_of(
    st.sampled_from(LITERALS).map(Raw),
    st.composite(nested)(),
    st.sampled_from([*URLS, *GRAMMARS]),
    st.sampled_from(SCHEMAS),
    media().map(lambda data: f"data:image/png;base64,{encoded(data)}"),
    media().map(lambda data: encoded(data)[:-1]),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    ),
    st.sampled_from(
        [[USER] * 300, [1] * 5000, ["a"] * 300, "ab " * 20_000, {str(i): 1 for i in range(2000)}, PARTS * 40]
    ),
)


def places(value, path=()):
    """Where anything stands in a body."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def written(value):
    """A body as JSON, what is raw in it as it is."""
    raw = []

    def marked(value):
        if isinstance(value, Raw):
            raw.append(value)
            return f"@raw{len(raw) - 1}@"
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list) else value

    text = json.dumps(marked(value))
    for i, literal in enumerate(raw):
        text = text.replace(f'"@raw{i}@"', literal)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def bodies(draw):
    """A request to an endpoint with JSON."""
    path, body = draw(st.sampled_from(VALID))
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(0, 3))):
        *way, last = draw(st.sampled_from(list(places(body))))
        parent = body
        for key in way:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "repeat"]))
        if what == "replace":
            parent[last] = copy.deepcopy(draw(ODD))
        elif what == "delete" and last != "max_tokens":
            del parent[last]
        elif what == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = copy.deepcopy(draw(ODD))
        elif isinstance(parent, list):
            parent += [copy.deepcopy(parent[last])] * draw(st.sampled_from([1, 3, 50]))
        if not body:
            break
    return path, written(body), {"Content-Type": "application/json"}


@st.composite
def forms(draw):
    """A request to an endpoint with a form."""
    path, fields = draw(st.sampled_from(FORMS))
    odd = st.text(max_size=20) | st.sampled_from(["-1", "nan", "1e999", "tlh", "x" * 2000, "<|end|>", "\0", "\ud800"])
    fields = [(name, draw(odd) if draw(st.integers(0, 4)) == 0 else value) for name, value in fields.items()]
    fields += draw(st.lists(st.tuples(st.sampled_from(["model", "file", "a", "prompt", "include[]"]), odd), max_size=2))
    files = [
        ("file", draw(st.sampled_from(["a.wav", "", '"', "a" * 3000, "é\r\nX: y"])), draw(media() | st.just(SPEECH)))
    ]
    files *= draw(st.sampled_from([1, 1, 1, 1, 0, 2, 1100]))
    boundary = draw(st.sampled_from(["a", "a", "a", "", "é", "a" * 300]))
    body = b""
    for name, value in fields:
        body += f'--a\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode(
            "utf-8", "surrogatepass"
        )
    for name, filename, data in files:
        head = f'--a\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n\r\n'
        body += head.encode() + data + b"\r\n"
    return (
        path,
        body + draw(st.sampled_from([b"--a--\r\n", b"--a--", b"", b"--a"])),
        {"Content-Type": f"multipart/form-data; boundary={boundary}".encode()},
    )


TYPES = [
    *("", "text/plain", "application/json; charset=utf-16", "application/x-www-form-urlencoded", "multipart/form-data"),
    *(
        "application/json",
        "multipart/form-data; boundary=",
        "multipart/mixed; boundary=a",
        "\xff",
        "application/xml,json",
    ),
]


@st.composite
def mangled(draw):
    """A request of which not even the form is right."""
    path, body, headers = draw(bodies() | forms())
    start = draw(st.integers(0, len(body)))
    how = draw(st.sampled_from(["cut", "noise", "utf-16", "type", "elsewhere", "binary", "encoding"]))
    if how == "cut":
        body = body[:start]
    elif how == "noise":
        body = body[:start] + draw(st.binary(min_size=1, max_size=20)) + body[start:]
    elif how == "utf-16":
        body = body.decode(errors="replace").encode("utf-16")
    elif how == "type":
        headers = {"Content-Type": draw(st.sampled_from(TYPES)).encode("latin-1")}
    elif how == "elsewhere":
        path = draw(st.sampled_from([path for path, _ in (*VALID, *FORMS)]))
    elif how == "binary":
        body = draw(st.binary(max_size=200))
    else:
        headers = {**headers, "Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}
    return path, body, headers


# --- the test ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def http(start):
    with start(context=512, max_waiting=32) as server, httpx.Client(base_url=server.url, timeout=120) as http:
        yield http


@pytest.fixture(scope="module")
def statuses():
    counts = collections.Counter()
    yield counts
    print("\nanswers:", dict(sorted(counts.items())), "in all", counts.total())


@pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile")  # of python-multipart's, where a form breaks off
@settings(
    max_examples=EXAMPLES or 300,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(asked=st.one_of(bodies(), bodies(), forms(), mangled()))
def test_no_request_is_an_error_of_the_server(http, statuses, asked):
    path, body, headers = asked
    content = iter([body]) if headers.get("Transfer-Encoding") else body
    answer = http.post(path, content=content, headers=headers)
    statuses[answer.status_code] += 1
    assert answer.status_code < 500
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error" and error["message"]
    elif answer.headers["Content-Type"].startswith("text/event-stream"):
        last = answer.text.strip().split("\n\n")[-1]
        assert (
            last == "data: [DONE]"
            or json.loads(last[6:])["error"]["type"] == "invalid_request_error"
            or "audio" in path
        )


def test_afterwards_it_still_answers(http):
    answer = http.post("/v1/chat/completions", json={"messages": [USER]})
    assert answer.json()["choices"][0]["message"]["content"] == "105"
    load = http.get("/ready").json()
    assert load["running"] == load["waiting"] == 0
    failures = [line for line in http.get("/metrics").text.splitlines() if 'status="5' in line]
    assert not failures
