"""Which preset a kind of device gets."""

from __future__ import annotations

import re
from typing import NamedTuple


class Choice(NamedTuple):
    """A preset, and why it was chosen."""

    preset: str
    reason: str
    known: bool = True
    """False if nothing is known of the device, so that the preset is a guess."""


class _Rule(NamedTuple):
    platforms: str
    """`jax.Device.platform`, or several with spaces between them."""
    kind: str
    """Pattern that occurs in the lower-case `jax.Device.device_kind`."""
    min_devices: int
    preset: str
    reason: str


# NVIDIA before Ampere, by name: Tesla and Quadro cards, T4, V100, P100, M60, K80, GTX, Titan, RTX 20xx.
_NO_BFLOAT16 = r"\b(tesla|quadro|titan|gtx|mx\d+|rtx 20\d\d|g[pv]100|[tvpmk]\d+)\b"
_GPU = "gpu cuda rocm"
_V5E = r"v5 ?lite|v5e"

_RULES = (  # the first that fits
    _Rule("cpu", "", 1, "cpu", "runs on any CPU"),
    _Rule("tpu", "v6", 1, "tpu_v6e", "32 GB class"),
    _Rule("tpu", _V5E, 8, "tpu_v5e_8", "16 GB class, 8 chips or more"),
    _Rule("tpu", _V5E, 1, "tpu_v5e_1", "16 GB class, fewer than 8 chips"),
    _Rule("tpu", r"v4(?! ?lite|i)|v5p?$|tpu ?v?7", 1, "tpu_v5p", "32 GB or more"),
    _Rule(_GPU, _NO_BFLOAT16, 1, "gpu_t4", "no bfloat16 units"),
    _Rule(_GPU, "", 1, "gpu_hopper", "bfloat16 units"),
    _Rule("tpu", "", 1, "tpu_v5e_1", "an unknown kind of TPU gets the preset that needs least"),
)


def choose_preset(platform: str, device_kind: str, num_devices: int) -> Choice:
    """Chooses by the names that `jax.Device` gives; an unknown platform gets the CPU's preset."""
    kind = device_kind.lower()
    for rule in _RULES:
        if platform in rule.platforms.split() and num_devices >= rule.min_devices and re.search(rule.kind, kind):
            return Choice(rule.preset, rule.reason, known=rule is not _RULES[-1])
    return Choice("cpu", f"unknown platform {platform}", known=False)
