"""Clients that people use, with nothing changed but the URL: LiteLLM and LangChain (`pip install -e ".[clients]"`)."""

import base64
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from phi4mm_jax.demo import read_cases


def b64(path):
    return base64.b64encode(path.read_bytes()).decode()


SUM, SPEECH, _, FIGURE, _ = read_cases()
QUESTION = [{"role": "user", "content": SUM.prompt}]
PICTURE = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + b64(FIGURE.images[0])}},
            {"type": "text", "text": FIGURE.prompt},
        ],
    }
]

# Of the libraries' own: LiteLLM's records of answers, and what both say about versions.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Add(BaseModel):
    """Adds two numbers."""

    model_config = ConfigDict(extra="forbid")

    a: Literal[21, 84]
    b: Literal[21, 84]


# --- LiteLLM -------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "Add", "parameters": Add.model_json_schema()}}


@pytest.fixture(scope="module")
def litellm():
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # instead of a download
        yield pytest.importorskip("litellm")


@pytest.fixture
def nano(server):
    return {"model": "openai/nano", "api_base": f"{server}/v1", "api_key": "none"}


def test_litellm_answers(litellm, nano):
    answer = litellm.completion(messages=PICTURE, **nano)
    assert answer.choices[0].message.content == FIGURE.expected
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 3
    with pytest.raises(litellm.BadRequestError, match="temperature = -1.0: expected"):
        litellm.completion(messages=PICTURE, temperature=-1, **nano)


def test_litellm_streams(litellm, nano):
    chunks = list(litellm.completion(messages=PICTURE, stream=True, stream_options={"include_usage": True}, **nano))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == FIGURE.expected
    assert chunks[-1].usage.completion_tokens == 3


def test_litellm_transcribes(litellm, nano):
    with SPEECH.audios[0].open("rb") as file:
        assert litellm.transcription(file=file, **nano).text == SPEECH.expected


def test_litellm_structure(litellm, nano):
    answer = litellm.completion(messages=QUESTION, response_format=Add, **nano)
    Add.model_validate_json(answer.choices[0].message.content)


@pytest.mark.parametrize("stream", [False, True])
def test_litellm_tools(litellm, nano, stream):
    pytest.importorskip("mcp")  # LiteLLM takes no tools without it
    tools = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    answer = litellm.completion(messages=QUESTION, stream=stream, **tools, **nano)
    if stream:
        answer = litellm.stream_chunk_builder(list(answer))
    message = answer.choices[0].message
    (call,) = message.tool_calls
    Add.model_validate_json(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "105"}
    assert litellm.completion(messages=[*QUESTION, message, result], max_tokens=8, **nano).usage.completion_tokens > 0


# --- LangChain -----------------------------------------------------------------------------------------------


@pytest.fixture
def chat(server):
    return pytest.importorskip("langchain_openai").ChatOpenAI(model="nano", base_url=f"{server}/v1", api_key="none")


def test_langchain_answers(chat):
    answer = chat.invoke(PICTURE)
    assert answer.content == FIGURE.expected
    assert answer.usage_metadata["output_tokens"] == 3
    assert [answer.content for answer in chat.batch([PICTURE, QUESTION])] == [FIGURE.expected, SUM.expected]


def test_langchain_parts(chat):
    """Its own form of pictures and speech."""
    for case, kind in ((FIGURE, "image"), (SPEECH, "audio")):
        path = (*case.images, *case.audios)[0]
        media = {"type": kind, "base64": b64(path), "mime_type": f"{kind}/{path.suffix[1:]}"}
        content = [media, {"type": "text", "text": case.prompt}]
        assert chat.invoke([{"role": "user", "content": content}]).content == case.expected


def test_langchain_streams(chat):
    chunks = list(chat.stream(PICTURE, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == FIGURE.expected
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 3


@pytest.mark.parametrize(
    ("method", "strict"), [("json_schema", True), ("json_schema", None), ("function_calling", True)]
)
def test_langchain_structure(chat, method, strict):
    assert isinstance(chat.with_structured_output(Add, method=method, strict=strict).invoke(QUESTION), Add)


def test_langchain_tools(chat):
    call = chat.bind_tools([Add], tool_choice="any", strict=True, parallel_tool_calls=False).invoke(QUESTION)
    (tool_call,) = call.tool_calls
    Add.model_validate(tool_call["args"])
    result = {"role": "tool", "tool_call_id": tool_call["id"], "content": "105"}
    assert chat.bind_tools([Add], max_tokens=8).invoke([*QUESTION, call, result]).usage_metadata["output_tokens"] > 0
