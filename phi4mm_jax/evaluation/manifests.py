"""Datasets that users keep in plain files: JSONL, CSV, or a folder of media with texts beside them."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from phi4mm_jax.evaluation.items import EvaluationError, Row

MANIFESTS = ("manifest.jsonl", "metadata.jsonl", "metadata.csv")
"""Names under which a folder lists its media."""
_MEDIA = {
    "audio": {".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff"},
    "image": {".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".ppm", ".avif"},
}
"""Column of each kind of media, and the suffixes that tell it."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows in memory; media among them are paths."""

    description: str
    """For messages and results."""
    directory: Path
    """That relative paths start from."""
    rows: Sequence[Row]

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(json.dumps(self.rows).encode(), digest_size=8).hexdigest()

    @property
    def columns(self) -> list[str]:
        """Every name that a row has, in order."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def column(self, name: str) -> list[Any]:
        return [row.get(name) for row in self.rows]


def read_manifest(path: Path) -> Rows:
    """Reads a JSONL file, an object a line, or a CSV file with a header; an empty cell is a column that its row lacks.

    The column `file_name` of the hub's metadata files becomes `audio` or `image`, as the file's suffix tells.

    Raises:
      EvaluationError: it cannot be read, or a line is damaged; the message names the line.
    """
    read = {".jsonl": _jsonl, ".csv": _csv}[path.suffix.lower()]
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [_with_medium(row) for row in read(file, path)]
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not rows:
        raise EvaluationError(f"{path}: holds no rows")
    return Rows(str(path), path.parent, rows)


def read_folder(directory: Path) -> Rows:
    """Reads a folder: its one manifest, or else its media, each with a text file of the same name beside it.

    A row of the latter has the columns `id`, the path without suffix, `audio` or `image` or both, and `text`.

    Raises:
      EvaluationError: there is neither a manifest nor media, there are several manifests, or a text is missing.
    """
    manifests = [name for name in MANIFESTS if (directory / name).is_file()]
    if len(manifests) > 1:
        raise EvaluationError(f"{directory}: has {' and '.join(manifests)}; name the one that is meant")
    if manifests:
        return read_manifest(directory / manifests[0])
    by_stem: dict[Path, dict[str, Any]] = {}
    for path in sorted(directory.rglob("*")):
        if kind := _kind(path):
            row = by_stem.setdefault(path.with_suffix(""), {})
            if kind in row:
                raise EvaluationError(f"{path}: {row[kind]} has the same name; one {kind} belongs to a text")
            row[kind] = path.relative_to(directory).as_posix()
    if not by_stem:
        raise EvaluationError(
            f"{directory}: holds no dataset; accepted: Parquet files, {', '.join(MANIFESTS)}, or recordings and "
            "pictures with .txt files of the same names"
        )
    rows = []
    for stem, media in by_stem.items():
        text = stem.with_name(f"{stem.name}.txt")
        try:
            content = text.read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EvaluationError(
                f"{text}: cannot be read ({reason}); expected the text of {[*media.values()][0]}"
            ) from None
        rows.append({"id": stem.relative_to(directory).as_posix(), **media, "text": content})
    return Rows(str(directory), directory, rows)


def _jsonl(file: Iterator[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EvaluationError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise EvaluationError(
                f'{path}, line {number}: expected an object such as {{"audio": ..., "answers": [...]}}'
            )
        yield row


def _csv(file: Iterator[str], path: Path) -> Iterator[Row]:
    lines = csv.reader(file, strict=True)
    try:
        header = next(lines, [])
        if len(set(header)) < len(header) or "" in header:
            raise EvaluationError(f"{path}, line 1: expected a header with a name for every column, each another")
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(header):
                raise EvaluationError(
                    f"{path}, line {lines.line_num}: has {len(cells)} cells, the header {len(header)}"
                )
            yield {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    except csv.Error as error:
        raise EvaluationError(f"{path}, line {lines.line_num}: not valid CSV ({error})") from None


def _with_medium(row: Row) -> Row:
    name = row.get("file_name")
    kind = _kind(Path(name)) if isinstance(name, str) else None
    return row if kind is None else {kind: name, **row}


def _kind(path: Path) -> str | None:
    return next((kind for kind, suffixes in _MEDIA.items() if path.suffix.lower() in suffixes), None)
