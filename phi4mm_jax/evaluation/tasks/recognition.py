"""Speech recognition: the Open ASR leaderboard, and the sets of the technical report."""

from __future__ import annotations

from phi4mm_jax.evaluation.tasks.languages import FRENCH, GERMAN, ITALIAN, LANGUAGES, PORTUGUESE, SPANISH, Language
from phi4mm_jax.evaluation.tasks.suite import Suite
from phi4mm_jax.evaluation.tasks.task import REPORT, Columns, HubDataset, Published, Task

TRANSCRIBE = "Transcribe the audio clip into text."
"""The prompt of the leaderboard, and of the model card."""
TRANSCRIPTS = ("text", "sentence", "normalized_text", "transcript", "transcription")
"""What datasets call the text of a recording, in the order in which the leaderboard looks for it."""

_CLIPS = Columns(name=("id", "file_name"), audios=("audio",), references=TRANSCRIPTS)
_LEADERBOARD = "Open ASR leaderboard of 2026-03-26"
_NORMALISER = "The leaderboard's normaliser drops more fillers and joins more words than Whisper's, used here."


def _recognition(
    name: str, title: str, source: HubDataset, metric: str = "wer", columns: Columns = _CLIPS, **fields: object
) -> Task:
    return Task(name=name, title=title, source=source, columns=columns, prompt=TRANSCRIBE, metric=metric, **fields)


def _leaderboard(
    suite: str, repo: str, part: str, title: str, config: str, split: str = "test", wer: float | None = None
) -> Task:
    published = None if wer is None else Published(score=wer, source=_LEADERBOARD)
    return _recognition(
        f"{suite}/{part}",
        title,
        HubDataset(repo=repo, config=config, split=split),
        published=published,
        note=_NORMALISER,
    )


_NOW = "open-asr", "hf-audio/open-asr-leaderboard"
OPEN_ASR = Suite(
    name="open-asr",
    title="Open ASR leaderboard, English",
    digits=2,
    tasks=(
        _leaderboard(*_NOW, "ami", "AMI, cleaned", "ami_cleaned"),
        _leaderboard(*_NOW, "earnings22", "Earnings-22", "earnings22"),
        _leaderboard(*_NOW, "gigaspeech", "GigaSpeech, cleaned", "gigaspeech_cleaned"),
        _leaderboard(*_NOW, "librispeech-clean", "LibriSpeech, clean", "librispeech", "test.clean"),
        _leaderboard(*_NOW, "librispeech-other", "LibriSpeech, other", "librispeech", "test.other"),
        _leaderboard(*_NOW, "spgispeech", "SPGISpeech", "spgispeech"),
        _leaderboard(*_NOW, "voxpopuli", "VoxPopuli, cleaned", "voxpopuli_cleaned_aa"),
    ),
    note="The sets since 2026-07-08; no figure of the released model on them is known, and averages over the older "
    "sets (open-asr-2025) do not compare. Since 2026-08-21 the leaderboard takes Earnings-22 in chunks that are joined "
    "before they are scored, instead of earnings22.",
)

_THEN = "open-asr-2025", "hf-audio/esb-datasets-test-only-sorted"
OPEN_ASR_2025 = Suite(
    name="open-asr-2025",
    title="Open ASR leaderboard, English, sets until 2026-07",
    digits=2,
    tasks=(
        _leaderboard(*_THEN, "ami", "AMI", "ami", wer=11.09),
        _leaderboard(*_THEN, "earnings22", "Earnings-22", "earnings22", wer=10.16),
        _leaderboard(*_THEN, "gigaspeech", "GigaSpeech", "gigaspeech", wer=9.33),
        _leaderboard(*_THEN, "librispeech-clean", "LibriSpeech, clean", "librispeech", "test.clean", wer=1.69),
        _leaderboard(*_THEN, "librispeech-other", "LibriSpeech, other", "librispeech", "test.other", wer=3.82),
        _leaderboard(*_THEN, "spgispeech", "SPGISpeech", "spgispeech", wer=3.06),
        _leaderboard(*_THEN, "tedlium", "TED-LIUM", "tedlium", wer=2.94),
        _leaderboard(*_THEN, "voxpopuli", "VoxPopuli", "voxpopuli", wer=6.04),
    ),
    published=Published(score=6.02, source=f"{_LEADERBOARD}; 6.14 at release ({REPORT})"),
    note="The sets that the published figures of the released model belong to.",
)


def _multilingual(collection: str, title: str, language: Language, error_rate: float) -> Task:
    return _recognition(
        f"multilingual-asr/{collection}-{language.code}",
        f"{title}, {language.name}",
        HubDataset(repo="hf-audio/open-asr-leaderboard-multilingual-datasets", config=f"{collection}_{language.code}"),
        language.error_rate,
        published=Published(score=error_rate, source="Open ASR leaderboard, multilingual"),
    )


MULTILINGUAL_ASR = Suite(
    name="multilingual-asr",
    title="Open ASR leaderboard, multilingual",
    digits=2,
    tasks=(
        _multilingual("mcv", "Common Voice", GERMAN, 4.14),
        _multilingual("fleurs", "FLEURS", GERMAN, 3.77),
        _multilingual("mcv", "Common Voice", FRENCH, 6.93),
        _multilingual("mls", "Multilingual LibriSpeech", FRENCH, 4.28),
        _multilingual("fleurs", "FLEURS", FRENCH, 4.39),
        _multilingual("mcv", "Common Voice", ITALIAN, 3.29),
        _multilingual("mls", "Multilingual LibriSpeech", ITALIAN, 7.20),
        _multilingual("fleurs", "FLEURS", ITALIAN, 1.95),
        _multilingual("mcv", "Common Voice", SPANISH, 4.01),
        _multilingual("mls", "Multilingual LibriSpeech", SPANISH, 3.98),
        _multilingual("fleurs", "FLEURS", SPANISH, 3.13),
        _multilingual("mls", "Multilingual LibriSpeech", PORTUGUESE, 6.88),
        _multilingual("fleurs", "FLEURS", PORTUGUESE, 3.35),
    ),
    published=Published(score=4.41, source="Open ASR leaderboard, multilingual"),
    note="Asked as the published row was; since 2026-08-05 the leaderboard's prompt names the language.",
)

FLEURS = "google/fleurs", "refs/convert/parquet"
"""Repository, and the branch that has it in Parquet."""

FLEURS_ASR = Suite(
    name="fleurs-asr",
    title="FLEURS, recognition",
    tasks=tuple(
        _recognition(
            f"fleurs-asr/{language.code}",
            f"FLEURS, {language.name}",
            HubDataset(repo=FLEURS[0], config=language.fleurs, revision=FLEURS[1]),
            language.error_rate,
            Columns(audios=("audio",), references=("transcription", "raw_transcription")),
        )
        for language in LANGUAGES
    ),
    published=Published(score=4.00, source=REPORT),
    note="The mean is over error rates of words, and of characters in Chinese and Japanese.",
)

COMMON_VOICE_ASR = Suite(
    name="common-voice-asr",
    title="Common Voice 15, recognition",
    tasks=tuple(
        _recognition(
            f"common-voice-asr/{language.code}",
            f"Common Voice 15, {language.name}",
            HubDataset(repo="mozilla-foundation/common_voice_15_0", config=language.common_voice),
            language.error_rate,
            Columns(name=("path",), audios=("audio",), references=("sentence",)),
        )
        for language in LANGUAGES
    ),
    published=Published(score=6.80, source=REPORT),
    note="The dataset is gated; a copy in Parquet is given with --data. The mean is over error rates of words, and of "
    "characters in Chinese and Japanese.",
)
