"""How fast a task was answered, from what its sessions measured.

A session leaves the JSON object that `SESSION` describes; of one that was killed only its records tell how long it ran.
Rates are sums over sums, so they do not depend on how often a run was interrupted, and with shards they are those of
one shard's devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from phi4mm_jax.evaluation.shards import Shard

CLOCK = (
    "from the first row that a session reads to its last answer: fetching rows, decoding and processing media, "
    "encoding, prefill and decode; not loading weights, scoring, or the time of compilations"
)
"""What the seconds that speed is measured by cover."""

SESSION = (
    *("seconds", "loading_seconds", "warm_up_seconds", "encode_seconds", "prefill_seconds", "decode_seconds"),
    *("prefill_tokens", "prefill_computed", "decode_tokens", "decode_computed"),
    *("patches", "patches_computed", "audio_frames", "audio_frames_computed"),
)
"""Numbers of a session besides its name `session` and its `rows`: seconds by the clock and before it, seconds of the
stages, and of what the stages worked on how much was asked for, and how much was computed with padding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What was done and how long it took, over all sessions."""

    items: int
    """That have an answer which counts, as in the next three."""
    audio_seconds: float
    """Of their recordings."""
    images: int
    """Their pictures."""
    completion_tokens: int
    """Of their answers."""
    seconds: float
    """By the clock, sessions and shards together."""
    wall_seconds: float
    """By the clock, of the shard that took longest."""
    sessions: int
    """How often the program ran."""
    killed: int
    """How many of these were killed; the next two lack them."""
    rows: Sequence[int]
    """How many items were answered together, in each session where this differs."""
    measured: Mapping[str, float]
    """The numbers `SESSION`, summed."""

    @property
    def rtfx(self) -> float | None:
        """Seconds of audio by second, as the Open ASR leaderboard defines it; None without audio."""
        return _ratio(self.audio_seconds, self.seconds) if self.audio_seconds else None

    @property
    def images_per_second(self) -> float | None:
        """Pictures by second; None without pictures."""
        return _ratio(self.images, self.seconds) if self.images else None

    @property
    def items_per_second(self) -> float | None:
        """Answers by second; None if nothing ran."""
        return _ratio(self.items, self.seconds)

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by the clock of the sessions that were not killed: encode, prefill, decode, and all else."""
        stages = {name: self.measured[f"{name}_seconds"] for name in ("encode", "prefill", "decode")}
        return stages | {"other": max(0.0, self.measured["seconds"] - sum(stages.values()))}

    @property
    def padding(self) -> dict[str, float]:
        """Of what was computed, the part that is padding: by kind, of those that there were."""
        kinds = {"prefill": "prefill_tokens", "decode": "decode_tokens", "image": "patches", "audio": "audio_frames"}
        shares = {}
        for name, asked in kinds.items():
            if computed := self.measured[f"{asked.removesuffix('_tokens')}_computed"]:
                shares[name] = 1 - self.measured[asked] / computed
        return shares

    def summary(self) -> dict[str, Any]:
        """All of it as JSON."""
        measured = self.measured
        return {
            "clock": CLOCK,
            "seconds": self.seconds,
            "wall_seconds": self.wall_seconds,
            "loading_seconds": measured["loading_seconds"],
            "warm_up_seconds": measured["warm_up_seconds"],
            "sessions": self.sessions,
            "killed_sessions": self.killed,
            "rows": list(self.rows),
            "audio_seconds": self.audio_seconds,
            "images": self.images,
            "completion_tokens": self.completion_tokens,
            "rtfx": self.rtfx,
            "items_per_second": self.items_per_second,
            "images_per_second": self.images_per_second,
            "tokens_per_second": _ratio(self.completion_tokens, self.seconds),
            "prefill_tokens_per_second": _ratio(measured["prefill_tokens"], measured["prefill_seconds"]),
            "decode_tokens_per_second": _ratio(measured["decode_tokens"], measured["decode_seconds"]),
            "stage_seconds": self.stages,
            "padding": self.padding,
        }


def measure_speed(shards: Sequence[Shard], counted: set[str]) -> Speed:
    """Sums up sessions.

    Args:
      shards: of one task.
      counted: ids of the items whose answers count.
    """
    measured = Counter({name: 0 for name in SESSION})
    walls, sessions, killed = [], 0, 0
    for shard in shards:
        elapsed = defaultdict[str, float](float)
        for record in shard.answered:
            if record.session:  # it was asked
                elapsed[record.session] = max(elapsed[record.session], record.elapsed)
        for session in shard.sessions:
            measured.update({name: session[name] for name in SESSION})
            elapsed[session["session"]] = session["seconds"]
        walls.append(sum(elapsed.values()))
        sessions += len(elapsed)
        killed += len(elapsed) - len(shard.sessions)
    answered = [record for shard in shards for record in shard.answered if record.id in counted]
    return Speed(
        items=len(answered),
        audio_seconds=math.fsum(record.audio_seconds for record in answered),
        images=sum(record.images for record in answered),
        completion_tokens=sum(record.completion_tokens for record in answered),
        seconds=sum(walls),
        wall_seconds=max(walls),
        sessions=sessions,
        killed=killed,
        rows=sorted({session["rows"] for shard in shards for session in shard.sessions}),
        measured=dict(measured),
    )


def total(speeds: Sequence[Speed]) -> Speed:
    """Of several tasks, each of which begins when all shards of the one before are done."""
    sums = {
        field.name: sum(getattr(speed, field.name) for speed in speeds)
        for field in dataclasses.fields(Speed)
        if field.name not in ("measured", "rows")
    }
    measured = {name: sum(speed.measured[name] for speed in speeds) for name in SESSION}
    return Speed(**sums, measured=measured, rows=sorted({rows for speed in speeds for rows in speed.rows}))


def _ratio(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds else None
