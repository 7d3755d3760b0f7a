"""Speech translation: CoVoST 2 and FLEURS, into English and from it, asked directly or through the transcript.

A suite that ends in `-chain` asks for the transcript first, a `<sep>`, and the translation behind it. `<sep>` is plain
text, no token of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from phi4mm_jax.evaluation.tasks.languages import CHINESE, ENGLISH, GERMAN, JAPANESE, LANGUAGES, Language
from phi4mm_jax.evaluation.tasks.recognition import FLEURS
from phi4mm_jax.evaluation.tasks.suite import Suite
from phi4mm_jax.evaluation.tasks.task import REPORT, Columns, HubDataset, JoinedDataset, Published, Row, Task

DIRECT = "Translate the audio to {language}."
"""The prompt of the model card."""
CHAIN = (
    "Transcribe the audio to text, and then translate the audio to {language}. "
    "Use <sep> as a separator between the original transcript and the translation."
)
"""The model card's prompt for both, one after the other."""

_COLUMNS = Columns(audios=("audio",), references=("translation",))
_CHAIN_COLUMNS = dataclasses.replace(_COLUMNS, facts=("transcript",))
_Pair = tuple[Language, Language]


def with_transcript(row: Row) -> Iterable[Row]:
    """Calls what is said `transcript`, in CoVoST 2 as in FLEURS."""
    yield {**row, "transcript": row["sentence" if "sentence" in row else "raw_transcription"]}


def _covost2(pair: _Pair) -> HubDataset:
    spoken, written = pair
    return HubDataset(repo="fixie-ai/covost2", config=f"{spoken.common_voice}_{written.common_voice}")


def _fleurs(pair: _Pair) -> JoinedDataset:
    spoken, written = (HubDataset(repo=FLEURS[0], config=language.fleurs, revision=FLEURS[1]) for language in pair)
    return JoinedDataset(rows=spoken, counterparts=written, columns={"translation": "raw_transcription"})


def _suite(
    name: str,
    title: str,
    source: Callable[[_Pair], HubDataset | JoinedDataset],
    pairs: Iterable[_Pair],
    published: tuple[float | None, float | None],
    note: str,
) -> tuple[Suite, Suite]:
    """Both suites of some pairs of languages: asked directly, and through the transcript."""
    direct, chain = (None if bleu is None else Published(score=bleu, source=REPORT) for bleu in published)
    direct_tasks, chain_tasks = [], []
    for pair in pairs:
        spoken, written = pair
        part, languages = f"{spoken.code}-{written.code}", f"{spoken.name} to {written.name}"
        task = Task(
            name=f"{name}/{part}",
            title=f"{title}, {languages}",
            source=source(pair),
            columns=_COLUMNS,
            prompt=DIRECT.format(language=written.name),
            max_tokens=256,
            metric=written.bleu,
        )
        direct_tasks.append(task)
        chain_tasks.append(
            dataclasses.replace(
                task,
                name=f"{name}-chain/{part}",
                title=f"{task.title}, through the transcript",
                columns=_CHAIN_COLUMNS,
                prompt=CHAIN.format(language=written.name),
                max_tokens=512,
                metric=f"{spoken.error_rate}+sep+{written.bleu}",
                prepare=with_transcript,
            )
        )
    return (
        Suite(name=name, title=title, tasks=tuple(direct_tasks), published=direct, note=note),
        Suite(
            name=f"{name}-chain",
            title=f"{title}, through the transcript",
            tasks=tuple(chain_tasks),
            published=chain,
            note=note,
        ),
    )


_OTHERS = tuple(language for language in LANGUAGES if language is not ENGLISH)
_INTO_ENGLISH = [(language, ENGLISH) for language in _OTHERS]
_COPY = "From a copy of CoVoST 2 that has its recordings; the original needs those of Common Voice 4 by hand."
_PAIRED = "Recordings of FLEURS with the sentence of the same number in the other language."

TRANSLATION = (
    *_suite("covost2", "CoVoST 2 into English", _covost2, _INTO_ENGLISH, (39.33, 40.76), _COPY),
    *_suite(
        "covost2-from-english",
        "CoVoST 2 from English",
        _covost2,
        [(ENGLISH, language) for language in (GERMAN, JAPANESE, CHINESE)],
        (None, None),
        f"{_COPY} Of the languages that the model hears, CoVoST 2 has these.",
    ),
    *_suite("fleurs-translation", "FLEURS into English", _fleurs, _INTO_ENGLISH, (29.86, 32.35), _PAIRED),
    *_suite(
        "fleurs-translation-from-english",
        "FLEURS from English",
        _fleurs,
        [(ENGLISH, language) for language in _OTHERS],
        (None, None),
        _PAIRED,
    ),
)
"""All suites."""
