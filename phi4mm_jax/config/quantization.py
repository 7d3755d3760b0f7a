"""Which weights are held in few bits, and how."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any, Literal

from phi4mm_jax.config.building import ConfigError, Settings, wrong

RowFormat = Literal["none", "int8", "w8a8", "fp8"]
WeightFormat = Literal[RowFormat, "int4"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig(Settings):
    """Number formats of the weights of products; everything else keeps `dtypes.params`.

    `int8`: one scale per output. `w8a8`: the same, and activations are rounded to int8 row by row. `fp8`: float8_e4m3fn
    with one scale per output. `int4`: a scale per output and `group_size` inputs.
    """

    decoder: WeightFormat = "none"
    """The decoder's projections, without the adapters."""
    adapters: WeightFormat = "none"
    """Both LoRA adapters."""
    embedding: RowFormat = "none"
    """The token embedding, which is also the output head."""
    encoders: RowFormat = "none"
    """The projections of the image and speech encoders."""
    group_size: Literal[32, 64, 128] = 64
    """Inputs that share a scale in int4."""
    zero_point: bool = False
    """Whether they share an offset, too."""
    keep: tuple[str, ...] = ()
    """Leaves that are left as they are: patterns such as "text.layers.0.*"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_point and "int4" not in (self.decoder, self.adapters):
            raise wrong("zero_point", True, "only int4 has one, in decoder or adapters")

    @property
    def quantizes(self) -> bool:
        """Whether anything is held in few bits."""
        return any(form != "none" for form in (self.decoder, self.adapters, self.embedding, self.encoders))

    def format_of(self, path: str, ndim: int) -> WeightFormat:
        """The format of a leaf, given its dotted path and number of dimensions."""
        tower, *_, name = path.split(".")
        if ndim != 2 or any(fnmatch.fnmatchcase(path, pattern) for pattern in self.keep):
            return "none"
        if path == "text.embed.weight":
            return self.embedding
        if name.endswith(("_a", "_b")):
            return self.adapters
        if name != "weight" or ".depthwise" in path:  # tables and filters, which are no products
            return "none"
        return self.decoder if tower == "text" else self.encoders


_WHOLE = {
    "int8": {"decoder": "int8", "adapters": "int8", "embedding": "int8"},
    "w8a8": {"decoder": "w8a8", "adapters": "w8a8", "embedding": "w8a8"},
    "fp8": {"decoder": "fp8", "adapters": "fp8", "embedding": "fp8"},
    "int4": {"decoder": "int4", "adapters": "int8", "embedding": "int8"},
}
"""What a single word asks for; the encoders, which run once a prompt, stay as they are."""
_NEAREST = {
    **dict.fromkeys(("2", "3", "4", "q2k", "q3k", "q4k", "q4_0", "q4_1", "hqq4", "afq4"), "int4"),
    **dict.fromkeys(("5", "6", "8", "q5k", "q6k", "q8k", "q5_0", "q5_1", "q8_0", "q8_1", "hqq8", "afq8"), "int8"),
}
"""The names of mistral.rs, in lower case."""


def quantization_settings(name: str | int) -> tuple[dict[str, Any], str]:
    """The settings of `QuantizationConfig` that one word asks for, and the format that it comes to.

    Args:
      name: `int8`, `w8a8`, `fp8`, `int4`, or a name of mistral.rs such as `Q4K`, `Q8_0`, 4 or 8.

    Raises:
      ConfigError: no such format.
    """
    word = str(name).lower()
    form = word if word in _WHOLE else _NEAREST.get(word)
    if form is None:
        names = ", ".join(("Q4K", "Q8_0", "4", "8"))
        raise ConfigError(f"quantize = {name!r}: expected {', '.join(_WHOLE)}, or a name of mistral.rs such as {names}")
    return _WHOLE[form], form
