"""What is known of a model before it is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from phi4mm_jax.config import ConfigError, ModelConfig
from phi4mm_jax.mistralrs.absent import refuse
from phi4mm_jax.weights.hub import resolve


def check_layers(model_id: str, token: str | bool | None, num_device_layers: Sequence[str]) -> None:
    """Refuses to divide a model by its layers; only what puts all of them on the first device is done.

    Args:
      model_id: what the model is asked for as.
      token: the hub's.
      num_device_layers: entries "NUM" or "DEVICE:NUM".

    Raises:
      NotImplementedError: they ask for something else.
      HubError, ConfigError: there is no such model.
    """
    layers = ModelConfig.from_checkpoint(resolve(model_id, token=token, weights=False)).text.num_layers
    number = num_device_layers[0].removeprefix("0:") if len(num_device_layers) == 1 else ""
    if not (number.isdecimal() and int(number) >= layers):
        refuse("Runner", num_device_layers=num_device_layers)


def read_token(source: str) -> str | bool | None:
    """The hub's token, as huggingface_hub takes it.

    Raises:
      ConfigError: there is none where `source` says, or `source` says nothing.
    """
    kind, colon, where = source.partition(":")
    try:
        match kind:
            case "cache" | "none" if not colon:
                return None if kind == "cache" else False
            case "literal" if where:
                return where
            case "env":
                return os.environ[where]
            case "path":
                return Path(where).read_text(encoding="utf-8").strip()
    except KeyError:
        raise ConfigError(f"token_source: the environment has no {where!r}") from None
    except OSError as error:
        raise ConfigError(f"token_source: {where} cannot be read ({error.strerror})") from None
    raise ConfigError("token_source: expected 'literal:TOKEN', 'env:NAME', 'path:FILE', 'cache' or 'none'")
