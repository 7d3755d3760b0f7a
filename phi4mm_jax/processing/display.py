"""How foreign values are shown in error messages: on one line, and short."""

from __future__ import annotations


def shorten(text: object, limit: int = 80) -> str:
    """Returns text of at most `limit` characters: what does not print is escaped, the middle of more is left out."""
    text = str(text)
    if len(text) > 2 * limit:  # spares escaping what will not be shown
        text = text[:limit] + text[-limit:]
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(shown) <= limit:
        return shown
    head = (limit - 3) // 2
    return f"{shown[:head]}...{shown[head + 3 - limit :]}"


def quote(value: object) -> str:
    """Returns a value as Python would write it, shortened."""
    return shorten(repr(value))
