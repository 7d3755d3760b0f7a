"""The languages that the model hears, and what datasets and metrics call them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language:
    """A language of speech."""

    code: str
    """ISO 639-1."""
    name: str
    """English, as prompts name it."""
    fleurs: str
    """Configuration of FLEURS."""
    region: str = ""
    """What Common Voice, and CoVoST 2 after it, appends to the code."""
    error_rate: str
    """Metric of transcripts: of characters where words are not set apart."""
    bleu: str = "bleu"
    """Metric of translations into it."""

    @property
    def common_voice(self) -> str:
        """Configuration of Common Voice, and half of one of CoVoST 2."""
        return self.code + self.region


ENGLISH = Language(code="en", name="English", fleurs="en_us", error_rate="wer")
CHINESE = Language(code="zh", name="Chinese", fleurs="cmn_hans_cn", region="-CN", error_rate="cer:zh", bleu="bleu:zh")
GERMAN = Language(code="de", name="German", fleurs="de_de", error_rate="wer:de")
FRENCH = Language(code="fr", name="French", fleurs="fr_fr", error_rate="wer:fr")
ITALIAN = Language(code="it", name="Italian", fleurs="it_it", error_rate="wer:it")
JAPANESE = Language(code="ja", name="Japanese", fleurs="ja_jp", error_rate="cer:ja", bleu="bleu:ja")
SPANISH = Language(code="es", name="Spanish", fleurs="es_419", error_rate="wer:es")
PORTUGUESE = Language(code="pt", name="Portuguese", fleurs="pt_br", error_rate="wer:pt")

LANGUAGES = (ENGLISH, CHINESE, GERMAN, FRENCH, ITALIAN, JAPANESE, SPANISH, PORTUGUESE)
"""All of them, in the order of the model card."""
