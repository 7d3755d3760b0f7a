"""A weight that shows what it is multiplied with: `Observed` stands wherever a weight of a product stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class Observed:
    """A weight [N, K] inside a traced function, which thereby can return what it sees."""

    weight: jax.Array
    """[N, K]."""
    see: Callable[[jax.Array], None]
    """Is given the other factor [..., K] of each product."""
