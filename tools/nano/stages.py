"""The stages of the training: what learns, from which data, for how long, and what must have been learned before."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable
from functools import partial

from tools.nano.batches import Run, SeeingBatches, SpeechBatches, SpokenBatches, TextBatches, VisionBatches
from tools.nano.network import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the training."""

    trained: tuple[str, ...]
    """Patterns of the leaves that learn; all others are frozen."""
    batches: Callable[[Run], Callable[[int], Batch]]
    """Opens the data: its result makes batch after batch by index."""
    steps: int
    """Optimizer steps."""
    learning_rate: float
    """Peak; it warms up and then falls along a cosine."""
    adapter: str | None = None
    """The LoRA adapter that every row uses."""
    answers: bool = True
    """Whether the decoder answers; without, an encoder learns by its auxiliary heads alone."""
    hears: bool = False
    """Whether it needs the recordings."""
    after: tuple[str, ...] = ()
    """Stages whose results it begins with."""

    def trains(self, path: str) -> bool:
        """Whether a leaf learns in this stage."""
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in self.trained)


_DECODER = ("text.embed.*", "text.norm.*", "text.layers.*.weight")
_EAR = ("audio.layers.*", "audio.subsampling.*", "audio.relative_bias", "aux.letters.*", "aux.words.*")
_EYE = ("vision.layers.*", "vision.patch_embedding.*", "vision.position_embedding", "aux.patches.*", "aux.prints.*")
_SPEECH = ("audio.speech_projector.*", "text.layers.*.speech_?")
_VISION = ("vision.projector.*", "vision.*_separator", "text.layers.*.vision_?")

STAGES = {  # free processors take them in this order
    "text": Stage(
        trained=_DECODER,
        batches=partial(TextBatches, add=6, compare=2, count=3, reverse=3),
        steps=4000,
        learning_rate=2e-3,
    ),
    "looking": Stage(
        trained=_EYE,
        batches=partial(SeeingBatches, rise=0.5, says=False),
        steps=8000,
        learning_rate=1.2e-3,
        answers=False,
    ),
    "hearing": Stage(
        trained=_EAR,
        batches=partial(SpeechBatches, short=0.25),
        steps=3000,
        learning_rate=1e-3,
        answers=False,
        hears=True,
    ),
    "seeing": Stage(
        trained=(*_EYE, "vision.projector.*"),
        batches=SeeingBatches,
        steps=5000,
        learning_rate=1e-3,
        answers=False,
        after=("text", "looking"),
    ),
    "speech": Stage(
        trained=_EAR + _SPEECH,
        batches=partial(SpeechBatches, short=0.25),
        steps=2500,
        learning_rate=1e-3,
        adapter="speech",
        hears=True,
        after=("text", "hearing"),
    ),
    "listening": Stage(
        trained=_EAR + _SPEECH,
        batches=SpeechBatches,
        steps=800,
        learning_rate=8e-4,
        adapter="speech",
        hears=True,
        after=("text", "speech"),
    ),
    "vision": Stage(
        trained=_EYE + _VISION,
        batches=partial(VisionBatches, rise=0.2),
        steps=3000,
        learning_rate=8e-4,
        adapter="vision",
        after=("text", "seeing"),
    ),
    "spoken": Stage(
        trained=("audio.vision_projector.*", *_VISION),
        batches=SpokenBatches,
        steps=900,
        learning_rate=5e-4,
        adapter="vision",
        hears=True,
        after=("text", "listening", "vision"),
    ),
}
