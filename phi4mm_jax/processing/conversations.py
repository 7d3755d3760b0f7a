"""Conversations in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi4mm_jax.processing.prompt import ChatError


def read_conversations(path: str | Path) -> list[list[Mapping[str, Any]]]:
    """Reads a JSONL file with an object per line whose `messages` is an OpenAI-style conversation.

    Raises:
      ChatError: it cannot be read, or a line is no such object; the message names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    conversations = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
        except (ValueError, KeyError, TypeError):
            messages = None
        if not isinstance(messages, list):
            raise ChatError(f'{path}, line {number}: expected an object such as {{"messages": [...]}}')
        conversations.append(messages)
    return conversations
