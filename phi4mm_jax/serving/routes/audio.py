"""Speech to text."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import PlainTextResponse

from phi4mm_jax.answer import Usage
from phi4mm_jax.runtime.sampling import SamplingParams
from phi4mm_jax.serving.answers import while_connected
from phi4mm_jax.serving.backend import Backend, TheBackend
from phi4mm_jax.serving.errors import refuse
from phi4mm_jax.serving.events import EventStream
from phi4mm_jax.serving.schemas import AudioFields, TranscriptionFields
from phi4mm_jax.serving.transcription import (
    LANGUAGES,
    TRANSLATE_INSTRUCTION,
    Recording,
    Transcription,
    joint,
    segments,
    srt,
    transcribe_instruction,
    vtt,
)

router = APIRouter(tags=["audio"])


@router.post("/v1/audio/transcriptions")
async def transcriptions(
    fields: Annotated[TranscriptionFields, Form(media_type="multipart/form-data")],
    request: Request,
    backend: TheBackend,
) -> Any:
    """Writes down a recording of any length."""
    called = time.perf_counter()
    language = _language(fields.language)
    if fields.stream and fields.response_format not in ("json", "text"):
        raise refuse("response_format", "json and text can be streamed")
    if fields.granularities and fields.response_format != "verbose_json":
        raise refuse("timestamp_granularities", "goes with response_format=verbose_json")
    instruction = transcribe_instruction(language)
    transcription, recording = await _begin(fields, instruction, called, request, backend, streaming=fields.stream)
    if fields.stream:
        return EventStream(_events(transcription, language), transcription, backend.metrics)
    return await _answer(fields, "transcribe", language, transcription, recording, request)


@router.post("/v1/audio/translations")
async def translations(
    fields: Annotated[AudioFields, Form(media_type="multipart/form-data")], request: Request, backend: TheBackend
) -> Any:
    """Translates a recording to English."""
    called = time.perf_counter()
    transcription, recording = await _begin(fields, TRANSLATE_INSTRUCTION, called, request, backend)
    return await _answer(fields, "translate", "en", transcription, recording, request)


def _language(given: str) -> str | None:
    names = {name.lower(): code for code, name in LANGUAGES.items()} | {code: code for code in LANGUAGES}
    if given and given.lower() not in names:
        raise refuse("language", f"{given!r} is not one that the model hears: {', '.join(LANGUAGES)}")
    return names.get(given.lower())


async def _begin(
    fields: AudioFields,
    instruction: str,
    called: float,
    request: Request,
    backend: Backend,
    streaming: bool = False,
) -> tuple[Transcription, Recording]:
    backend.check_model(fields.model)
    detailed = fields.response_format == "verbose_json"
    params = SamplingParams(temperature=fields.temperature, logprobs=0 if detailed else None)
    data, settings = await fields.file.read(), backend.settings
    recording = await while_connected(
        request, backend.prepare(Recording.decode, data, settings.media, settings.segment_s)
    )
    text = f"{instruction} {fields.prompt}" if fields.prompt else instruction
    transcription = Transcription(backend, recording, text, params, called=called)
    await transcription.begin(streaming=streaming)
    return transcription, recording


async def _answer(
    fields: AudioFields,
    task: str,
    language: str | None,
    transcription: Transcription,
    recording: Recording,
    request: Request,
) -> Any:
    with contextlib.closing(transcription):
        outputs = await while_connected(request, transcription.outputs())
    texts = [output.text.strip() for output in outputs]
    text = joint(language).join(filter(None, texts))
    if fields.response_format == "text":
        return PlainTextResponse(f"{text}\n")
    if fields.response_format == "json":
        return {"text": text, "usage": _usage([output.usage for output in outputs])}
    if fields.response_format in ("srt", "vtt"):
        subtitles = srt if fields.response_format == "srt" else vtt
        return PlainTextResponse(subtitles(recording, texts))
    return {
        "task": task,
        "language": LANGUAGES[language].lower() if language else None,
        "duration": recording.seconds,
        "text": text,
        "segments": segments(recording, outputs, fields.temperature),
        "usage": {"type": "duration", "seconds": round(recording.seconds)},
    }


async def _events(transcription: Transcription, language: str | None) -> AsyncIterator[dict[str, Any]]:
    text, last, costs = "", 0, []
    async for part, piece in transcription.pieces():
        delta = piece.text if part == last else joint(language) + piece.text
        last = part
        if delta:
            text += delta
            yield {"type": "transcript.text.delta", "delta": delta}
        if piece.usage:
            costs.append(piece.usage)
    yield {"type": "transcript.text.done", "text": text, "usage": _usage(costs)}


def _usage(parts: list[Usage]) -> dict[str, Any]:
    prompt, answer = sum(u.prompt_tokens for u in parts), sum(u.completion_tokens for u in parts)
    audio = sum(u.audio_tokens for u in parts)
    return {
        "type": "tokens",
        "input_tokens": prompt,
        "output_tokens": answer,
        "total_tokens": prompt + answer,
        "input_token_details": {"audio_tokens": audio, "text_tokens": prompt - audio},
    }
