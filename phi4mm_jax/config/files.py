"""The files that configurations come from; every error names the file."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phi4mm_jax.config.building import ConfigError, S, SettingError, build


def config_directory() -> Path:
    """Where the shipped TOML files lie: inside the installed package, or at the root of a source checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def build_from_toml(cls: type[S], path: Path) -> S:
    """Builds `cls` from a TOML file.

    Raises:
      ConfigError: the file cannot be read, or a setting is unknown, missing or wrong.
    """
    values = read_toml(path)
    try:
        return build(cls, values)
    except SettingError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file."""
    return _read(path, tomllib.loads, "TOML")


def read_json(path: Path) -> Mapping[str, Any]:
    """Reads a JSON file whose top level is an object."""
    content = _read(path, json.loads, "JSON")
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read(path: Path, parse: Callable[[str], Any], kind: str) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid {kind} ({error})") from None
