"""`phi4mm demo`: the small model that comes with the package hears, reads and answers, without a download."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phi4mm_jax.api import Phi4MM

_DIRECTORY = Path(__file__).parent / "assets" / "demo"


class DemoError(ValueError):
    """The bundled model does not answer as it did where it was made."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt whose answer is known."""

    title: str
    """What it shows."""
    prompt: str
    """The text; "" where the question is spoken."""
    images: tuple[Path, ...] = ()
    """Its pictures."""
    audios: tuple[Path, ...] = ()
    """Its recordings, which follow the pictures."""
    before: tuple[dict[str, Any], ...] = ()
    """Messages that come before the prompt."""
    expected: str
    """The right answer."""

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The prompt as messages."""
        parts = [{"type": "image", "image": path} for path in self.images]
        parts += [{"type": "audio", "audio": path} for path in self.audios]
        return [*self.before, {"role": "user", "content": [*parts, {"type": "text", "text": self.prompt}]}]


def read_cases(directory: Path = _DIRECTORY) -> list[Case]:
    """The cases in a directory, as tools/nano/cases.py writes them; the bundled ones by default."""
    cases = json.loads((directory / "cases.json").read_text(encoding="utf-8"))
    for case in cases:
        case |= {kind: tuple(directory / name for name in case.get(kind, ())) for kind in ("images", "audios")}
        case["before"] = tuple(case.get("before", ()))
    return [Case(**case) for case in cases]


def run_demo(model: Phi4MM, say: Callable[[str], None] = print) -> bool:
    """Answers every case by itself and then all of them as one batch.

    Args:
      model: the small model, or any other.
      say: takes the report line by line.

    Returns:
      Whether all answers were as expected.
    """
    cases = read_cases()
    right = True
    for case in cases:
        model.generate(case.conversation)  # compiles, which would spoil the speed
        output = model.generate(case.conversation)
        files = " ".join(path.name for path in (*case.images, *case.audios))
        say(f"\n{case.title}" + (f": {files}" if files else ""))
        say(f"  prompt    {case.prompt or '(spoken)'}")
        say(f"  answer    {output.text}")
        say(f"  expected  {case.expected}{'' if output.text == case.expected else '   <- differs'}")
        usage = output.usage
        media = usage.image_tokens + usage.audio_tokens
        say(f"  {usage.prompt_tokens} tokens in ({media} of media), {_speed(usage.completion_tokens, usage.seconds)}")
        right &= output.text == case.expected

    batch = [case.conversation for case in cases]
    model.generate(batch)
    outputs = model.generate(batch)
    same = sum(output.text == case.expected for output, case in zip(outputs, cases, strict=True))
    tokens = sum(output.usage.completion_tokens for output in outputs)
    say(f"\nAll {len(cases)} in one batch, each row through its own adapter")
    say(f"  {same} of {len(cases)} as expected, {_speed(tokens, max(output.usage.seconds for output in outputs))}")
    return right and same == len(cases)


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens} out in {1000 * seconds:.0f} ms: {tokens / seconds:.0f} tokens/s"
