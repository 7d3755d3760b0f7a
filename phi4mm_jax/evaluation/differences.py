"""Where a transcript differs from its reference."""

from __future__ import annotations

import dataclasses
import unicodedata

from rapidfuzz.distance import Levenshtein


@dataclasses.dataclass(frozen=True)
class Span:
    """Neighbouring words of one kind."""

    kind: str
    """ "equal", "missing" from the prediction, or "added" by it."""
    text: str
    """As the reference writes them, or the prediction if it added them."""


def differences(reference: str, prediction: str, by_characters: bool = False) -> list[Span]:
    """Aligns two short texts by the fewest edits; case and punctuation make no difference.

    Args:
      reference: the right text.
      prediction: the model's.
      by_characters: whether characters are compared, as of languages without spaces, and not words.
    """
    right = _tokens(reference, by_characters)
    found = _tokens(prediction, by_characters)
    space = "" if by_characters else " "
    spans = []
    for edit in Levenshtein.opcodes([_bare(token) for token in right], [_bare(token) for token in found]):
        if edit.tag == "equal":
            spans.append(Span("equal", space.join(right[edit.src_start : edit.src_end])))
        else:
            missing, added = right[edit.src_start : edit.src_end], found[edit.dest_start : edit.dest_end]
            spans += [Span("missing", space.join(missing))] if missing else []
            spans += [Span("added", space.join(added))] if added else []
    return spans


def _tokens(text: str, by_characters: bool) -> list[str]:
    """Words, or characters without spaces; those that are nothing but punctuation are left out."""
    tokens = "".join(text.split()) if by_characters else text.split()
    return [token for token in tokens if _bare(token)]


def _bare(token: str) -> str:
    """A token as it is compared."""
    folded = unicodedata.normalize("NFKC", token).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] not in "PS")
