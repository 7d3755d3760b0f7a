"""Reads a checkpoint's JSON files into the settings of `ModelConfig` (phi4mm-reference, section 1)."""

from __future__ import annotations

import itertools
import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi4mm_jax.config.building import ConfigError, S, SettingError, build, wrong
from phi4mm_jax.config.files import config_directory, read_json, read_toml
from phi4mm_jax.config.layouts import GENERATION, HUB, LAYOUTS, OVERRIDES, Layout

# What the files need not say, for the original has it in its code: then it is as in the released model.
_OPTIONAL = ("vision.", "tokens.image", "tokens.audio")


def build_from_checkpoint(cls: type[S], directory: Path) -> S:
    """Builds `cls` from the settings that `Layout.sources` names.

    Raises:
      ConfigError: a file is missing or malformed, or says what is not supported; the message names file and key.
    """
    files = _Files(directory)
    kind = files.require("model_type")
    if kind not in tuple(LAYOUTS):  # a tuple takes values that cannot be hashed
        raise wrong(files.name("model_type"), kind, f"expected {' or '.join(LAYOUTS)}")
    layout = LAYOUTS[kind]
    _check(files, layout)
    released = read_toml(config_directory() / "model" / "phi4mm.toml")
    values: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    for setting, references in layout.sources.items():
        section, _, name = setting.partition(".")
        reference = files.first(references)
        value = files.find(reference)
        if value is None:
            value = released[section][name] if setting.startswith(_OPTIONAL) else files.require(reference)
        values.setdefault(section, {})[name] = value
        origins[setting] = files.name(reference)
    tokens = values["tokens"]
    if isinstance(tokens["eos"], int):
        tokens["eos"] = [tokens["eos"]]
        if layout is HUB and files.find(f"{GENERATION}#eos_token_id") is None:  # the original's code adds its own
            end = files.find(f"{OVERRIDES}.end_token_id")
            tokens["eos"].insert(0, released["tokens"]["eos"][0] if end is None else end)
    try:
        return build(cls, values)
    except SettingError as error:
        setting, bracket, index = error.name.partition("[")
        raise ConfigError(f"{origins[setting]}{bracket}{index} {error.problem}") from None


class _Files:
    """The JSON files of a directory, each read when first asked for; null counts as absent."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._contents: dict[str, Mapping[str, Any]] = {}

    def name(self, reference: str) -> str:
        """What an error calls the value of a reference."""
        file, keys = _split(reference)
        return f"{self._directory / file}: {keys}"

    def find(self, reference: str) -> Any:
        """Returns a value, None where it or its file is absent.

        Raises:
          ConfigError: the file is malformed, or what should hold the value is no table.
        """
        file, keys = _split(reference)
        if file not in self._contents:
            path = self._directory / file
            self._contents[file] = read_json(path) if os.path.exists(path) else {}
        value: Any = self._contents[file]
        walked: list[str] = []
        for key in keys.split("."):
            if value is None:
                return None
            if not isinstance(value, Mapping):
                raise wrong(f"{self._directory / file}: {'.'.join(walked)}", value, "expected a table")
            value = value.get(key)
            walked.append(key)
        return value

    def first(self, references: str) -> str:
        """Returns the first of several references that has a value; if none has, the first that has a file."""
        candidates = references.split(" | ")
        found = (r for r in candidates if self.find(r) is not None)
        possible = (r for r in candidates if os.path.exists(self._directory / _split(r)[0]))
        return next(itertools.chain(found, possible, candidates))

    def require(self, reference: str) -> Any:
        """Returns a value that must be there."""
        value = self.find(reference)
        if value is None:
            path = self._directory / _split(reference)[0]
            if not os.path.exists(path):
                raise ConfigError(f"{path}: no such file; expected a checkpoint directory with config.json")
            raise ConfigError(f"{self.name(reference)} is missing")
        return value


def _split(reference: str) -> tuple[str, str]:
    """Returns the file and the dotted key of a reference."""
    file, hash_sign, keys = reference.rpartition("#")
    return file if hash_sign else "config.json", keys


def _check(files: _Files, layout: Layout) -> None:
    """Raises ConfigError if the files ask for what is not implemented."""
    for reference, only in layout.constants.items():
        value = files.find(reference)
        if value is not None and value != only:
            raise wrong(files.name(reference), value, f"only {only!r} is supported")
    for reference, other in layout.equals.items():
        value, expected = files.find(reference), files.find(other)
        if None not in (value, expected) and value != expected:
            raise wrong(files.name(reference), value, f"expected {expected!r}, the value of {other}")
    window, context = files.find("sliding_window"), files.find("max_position_embeddings")
    if isinstance(context, int) and window is not None and not (isinstance(window, int) and window >= context):
        raise wrong(files.name("sliding_window"), window, f"expected null or at least {context}, the whole context")
