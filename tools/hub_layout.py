"""Writes rows as datasets lie on the hub: Parquet by configuration and split, and a README.md that lists them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_MEDIUM = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

Rows = Sequence[Mapping[str, Any]]
"""Rows by column, all with the same columns."""


def medium(path: Path) -> dict[str, Any]:
    """A picture or a recording as Parquet holds it."""
    return {"bytes": path.read_bytes(), "path": path.name}


def write_dataset(directory: Path, configs: Mapping[str, Mapping[str, Rows]], shards: int = 1) -> None:
    """Writes a dataset.

    Args:
      directory: to write to; it may exist.
      configs: rows by split by configuration. Media are `{"bytes": ..., "path": ...}` or lists of these; recordings
        are in columns whose names begin with "audio".
      shards: files of each split; rows stay in order.
    """
    readme = ["---", "configs:"]
    for config, splits in configs.items():
        folder = "data" if config == "default" else config
        (directory / folder).mkdir(parents=True, exist_ok=True)
        readme += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            readme += [f"  - split: {split}", f"    path: {folder}/{split}-*"]
            table = _table(rows)
            bounds = [len(rows) * shard // shards for shard in range(shards + 1)]
            for shard, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
                name = f"{split}-{shard:05}-of-{shards:05}.parquet"
                pq.write_table(table.slice(start, end - start), directory / folder / name)
    (directory / "README.md").write_text("\n".join([*readme, "---", ""]), encoding="utf-8")


def _table(rows: Rows) -> pa.Table:
    """The rows, with what `datasets` notes beside them about media."""
    columns, features = {}, {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        lists = any(isinstance(value, list) for value in values)
        if any(isinstance(value, Mapping) for value in (sum(values, []) if lists else values)):
            feature = {"_type": "Audio" if name.startswith("audio") else "Image"}
            columns[name] = pa.array(values, pa.list_(_MEDIUM) if lists else _MEDIUM)
            features[name] = {"feature": feature, "_type": "List"} if lists else feature
        else:
            columns[name] = pa.array(values)
            features[name] = {"dtype": str(columns[name].type), "_type": "Value"}
    noted = json.dumps({"info": {"features": features}})
    return pa.table(columns).replace_schema_metadata({"huggingface": noted})
