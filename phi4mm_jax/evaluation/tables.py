"""How results are written in tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from phi4mm_jax.evaluation.results import Results
from phi4mm_jax.evaluation.statistics import CONFIDENCE, Estimate

_NONE = "–"
_ELSEWHERE = ("task", "metric", "prompt", "fingerprint")
"""Settings that a row shows in other words, or that are too long for it."""


def markdown(results: Sequence[Results]) -> str:
    """A table with a row for each task or suite, to be pasted."""
    header = (
        *("task", "dataset", "n", "metric", f"score [{CONFIDENCE} % interval]", "published", "difference", "RTFx"),
        *("hardware", "rows", "settings"),
    )
    rows = [header, ["---"] * len(header), *map(_row, results)]
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)


def _row(results: Results) -> list[str]:
    return [
        results.title,
        dataset(results),
        str(results.estimate.units),
        directed(results.metric, results.lower_is_better),
        f"{number(results.score)} {interval(results.estimate)}".strip(),
        _NONE if results.published is None else f"{number(results.published.score)} ({results.published.source})",
        number(results.difference, "+"),
        number(results.speed.rtfx),
        hardware(results.hardware),
        ", ".join(map(str, results.speed.rows)) or _NONE,
        pairs({name: value for name, value in results.settings.items() if name not in _ELSEWHERE}),
    ]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def number(value: float | None, sign: str = "") -> str:
    """Two decimals, or a dash for what is not there."""
    return _NONE if value is None else f"{value:{sign}.2f}"


def interval(estimate: Estimate) -> str:
    """A confidence interval in brackets."""
    return "" if estimate.low is None else f"[{estimate.low:.2f}, {estimate.high:.2f}]"


def directed(title: str, lower_is_better: bool) -> str:
    """The title of a metric and the direction that is better."""
    return f"{title} {'↓' if lower_is_better else '↑'}"


def dataset(results: Results) -> str:
    """What was asked, and which part of it."""
    return results.dataset + (f", shards {results.shards}" if results.shards else "")


def hardware(machines: Sequence[Mapping[str, Any]]) -> str:
    """Devices of several machines together; of a CPU its name."""
    devices = Counter[str]()
    for machine in machines:
        if machine["kind"] == "cpu":
            devices[f"{machine['processor']}, {machine['cores']} cores"] += 1
        else:
            devices[machine["kind"]] += machine["devices"]
    return "; ".join(f"{count} × {name}" for name, count in devices.items())


def pairs(values: Mapping[str, Any]) -> str:
    """Names and values that are set, on one line."""
    shown = {name: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for name, v in values.items()}
    return ", ".join(f"{name} {shown[name]}" for name, value in values.items() if value is not None)
