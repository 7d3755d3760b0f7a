"""Transcriptions by OpenAI's own client."""

import io

import httpx
import numpy as np
import openai
import pytest
import soundfile

from phi4mm_jax.demo import read_cases
from phi4mm_jax.serving.transcription import Recording, srt, transcribe_instruction, vtt

CASE = read_cases()[1]
SPEECH = CASE.audios[0]
DURATION = soundfile.info(SPEECH).duration


@pytest.fixture(scope="module")
def twice() -> bytes:
    """The sentence twice, with a pause."""
    samples, rate = soundfile.read(SPEECH, dtype="float32")
    pause = np.zeros(rate // 2, np.float32)
    file = io.BytesIO()
    soundfile.write(file, np.concatenate([samples, pause, pause, samples]), rate, format="FLAC")
    return file.getvalue()


def ask(client, file=SPEECH, **fields):
    return client.audio.transcriptions.create(model="nano", file=file, **fields)


def test_json(client):
    answer = ask(client)
    assert answer.text == CASE.expected
    assert answer.usage.input_token_details.audio_tokens > 0
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_text(client):
    assert ask(client, response_format="text", language="en") == CASE.expected + "\n"


def test_streams(client):
    *deltas, done = ask(client, stream=True)
    assert {delta.type for delta in deltas} == {"transcript.text.delta"}
    assert len(deltas) == len(CASE.expected.split())
    assert "".join(delta.delta for delta in deltas) == done.text == CASE.expected
    assert done.type == "transcript.text.done" and done.usage.output_tokens == len(deltas) + 1


@pytest.fixture(scope="module")
def sentences(start):
    """A client of a server that hears as much at once as the small model was trained to."""
    with (
        start(segment_s=DURATION + 0.9, rows=1) as other,
        openai.OpenAI(base_url=f"{other.url}/v1", api_key="-") as client,
    ):
        yield client


def test_a_long_recording_is_cut_at_its_silences(sentences, twice):
    answer = ask(sentences, ("two.flac", twice), response_format="verbose_json", timestamp_granularities=["segment"])
    assert answer.text == f"{CASE.expected} {CASE.expected}"
    assert [s.text for s in answer.segments] == [CASE.expected] * 2
    first, second = answer.segments
    assert (first.start, first.end, second.end) == (0, second.start, pytest.approx(answer.duration, abs=1e-3))
    assert answer.duration / 2 == pytest.approx(first.end, abs=0.6)
    assert all(-0.5 < s.avg_logprob < 0 and len(s.tokens) == 8 for s in answer.segments)


def test_streams_a_long_recording(sentences, twice):
    *deltas, done = ask(sentences, ("two.flac", twice), stream=True)
    assert "".join(delta.delta for delta in deltas) == done.text == f"{CASE.expected} {CASE.expected}"


def test_subtitles(sentences, twice):
    blocks = ask(sentences, ("two.flac", twice), response_format="srt").strip().split("\n\n")
    assert [block.split("\n")[0] for block in blocks] == ["1", "2"]
    assert [block.split("\n")[2] for block in blocks] == [CASE.expected] * 2
    assert ask(sentences, ("two.flac", twice), response_format="vtt").count(CASE.expected) == 2


def test_times_of_subtitles():
    recording = Recording(np.zeros(0, np.float32), 10, [(0, 15), (15, 36_754)])
    assert srt(recording, ["a", "b"]) == (
        "1\n00:00:00,000 --> 00:00:01,500\na\n\n2\n00:00:01,500 --> 01:01:15,400\nb\n"
    )
    assert vtt(recording, ["a", "b"]).startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.500\na\n\n00:00:01.500 --> ")


def test_translation(server):
    fields = {"model": "nano", "response_format": "verbose_json"}
    files = {"file": ("001.ogg", SPEECH.read_bytes())}
    answer = httpx.post(f"{server}/v1/audio/translations", data=fields, files=files, timeout=60).json()
    assert (answer["task"], answer["language"], answer["duration"]) == ("translate", "english", DURATION)
    assert len(answer["segments"]) == 1


def test_instructions():
    assert transcribe_instruction(None) == transcribe_instruction("en") == "Transcribe the audio clip into text."
    assert transcribe_instruction("de") == "Transcribe the German audio clip into text."


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"language": "tlh"}, "language", "zh, de"),
        ({"response_format": "diarized_json"}, "response_format", "'srt'"),
        (
            {"timestamp_granularities": ["word"], "response_format": "verbose_json"},
            "timestamp_granularities[]",
            "segment",
        ),
        ({"timestamp_granularities": ["segment"]}, "timestamp_granularities", "verbose_json"),
        ({"stream": True, "response_format": "srt"}, "response_format", "json and text"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"include": ["logprobs"]}, "include[]", "not a field"),
    ],
)
def test_what_cannot_be_had_is_refused(client, fields, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(client, **fields)
    assert caught.value.param == param


def test_a_file_that_is_no_recording(client, server):
    with pytest.raises(openai.BadRequestError, match="accepted: WAV") as caught:
        ask(client, ("a.wav", b"no sound"))
    assert caught.value.param == "file"
    answer = httpx.post(f"{server}/v1/audio/transcriptions", data={"model": "nano"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")
