"""Rows of datasets in every form that is accepted, here on disk; `test_hub_data.py` has those on the hub."""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.parquet import ParquetRows
from phi4mm_jax.evaluation.repositories import LocalRepository
from phi4mm_jax.evaluation.sources import open_source, rows_of_shard
from phi4mm_jax.evaluation.tasks.task import HubDataset, JoinedDataset

README = """---
license: mit
configs:
{}
---
# A dataset
"""


def write(path: Path, rows: Sequence[dict[str, Any]], row_group_size: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)


def fill(directory: Path, files: dict[str, str]) -> None:
    """Writes a Parquet file of one row for each path, and the README."""
    for path, content in files.items():
        if path == "README.md":
            (directory / path).write_text(content)
        else:
            write(directory / path, [{"id": content}])


def ids(source: Sequence[dict[str, Any]]) -> list[Any]:
    return [source[i]["id"] for i in range(len(source))]


# --- layouts of repositories ---------------------------------------------------------------------------------

DECLARED = {  # as lmms-lab/DocVQA
    "README.md": README.format(
        """- config_name: DocVQA
  data_files:
  - split: validation
    path: DocVQA/validation-*
  - split: test
    path: DocVQA/test-*
- config_name: InfographicVQA
  data_files:
  - split: validation
    path: InfographicVQA/validation-*"""
    ),
    "DocVQA/validation-00000-of-00002.parquet": "doc 0",
    "DocVQA/validation-00001-of-00002.parquet": "doc 1",
    "DocVQA/test-00000-of-00001.parquet": "doc test",
    "InfographicVQA/validation-00000-of-00001.parquet": "info",
}
DOTTED = {  # as hf-audio/esb-datasets-test-only-sorted
    "README.md": README.format(
        """- config_name: ami
  data_files: [{split: test, path: ami/test-*}]
- config_name: librispeech
  data_files:
  - {split: test.clean, path: librispeech/test.clean-*}
  - {split: test.other, path: [librispeech/test.other-*]}"""
    ),
    "ami/test-00000-of-00001.parquet": "ami",
    "librispeech/test.clean-00000-of-00001.parquet": "clean",
    "librispeech/test.other-00000-of-00001.parquet": "other",
}
PLAIN = {  # as echo840/OCRBench, whose README has no configs
    "README.md": "# OCRBench\n",
    "data/test-00000-of-00001-0123456789abcdef.parquet": "ocr",
    "data/train-00000-of-00001-0123456789abcdef.parquet": "train",
}
FOLDERS = {"en/dev-00000-of-00001.parquet": "en", "cn/dev-00000-of-00001.parquet": "cn"}  # as lmms-lab/MMBench
CONVERTED = {"default/test/0000.parquet": "a", "default/test/0001.parquet": "b", "de_de/partial-test/0000.parquet": "c"}
SPLIT_FOLDERS = {"fleurs_de/test/part-0.parquet": "de", "fleurs_fr/test/part-0.parquet": "fr", "test.parquet": "plain"}
LISTED = {
    "README.md": README.format(
        """- config_name: strings
  data_files: [b.parquet, a.parquet, "a.*"]
- config_name: mapping
  default: true
  data_files: {test: "./c.parquet"}
- config_name: inside
  data_dir: nested/deep
- config_name: below
  data_dir: nested
  data_files: "**/*.parquet"
- config_name: pages
  data_files: "*.txt" """
    ),
    **{f"{name}.parquet": name for name in "abc"},
    "nested/deep/test-00000-of-00001.parquet": "deep",
    "nested/deep/data/dev.parquet": "dev",
}
BROKEN = {"README.md": "---\nconfigs: [}\n---\n", "data/test.parquet": "kept"}


@pytest.mark.parametrize(
    ("files", "config", "split", "expected"),
    [
        (DECLARED, "DocVQA", "validation", ["doc 0", "doc 1"]),
        (DECLARED, "DocVQA", "test", ["doc test"]),
        (DECLARED, "InfographicVQA", "validation", ["info"]),
        (DOTTED, "librispeech", "test.clean", ["clean"]),
        (DOTTED, "librispeech", "test.other", ["other"]),
        (PLAIN, None, "test", ["ocr"]),
        (PLAIN, "default", "train", ["train"]),
        (FOLDERS, "cn", "dev", ["cn"]),
        (CONVERTED, None, "test", ["a", "b"]),
        (SPLIT_FOLDERS, "fleurs_fr", "test", ["fr"]),
        (SPLIT_FOLDERS, None, "test", ["plain"]),
        (LISTED, "strings", "train", ["b", "a"]),
        (LISTED, None, "test", ["c"]),
        (LISTED, "inside", "test", ["deep"]),
        (LISTED, "inside", "dev", ["dev"]),
        (LISTED, "below", "train", ["dev", "deep"]),
        (BROKEN, None, "test", ["kept"]),
    ],
)
def test_layouts(tmp_path: Path, files: dict[str, str], config: str | None, split: str, expected: list[str]) -> None:
    fill(tmp_path, files)
    source = open_source(HubDataset(repo="owner/name", config=config, split=split), tmp_path)
    assert ids(source) == expected
    assert list(source.columns) == ["id"]


@pytest.mark.parametrize(
    ("files", "config", "split", "message"),
    [
        (DECLARED, "docvqa", "test", "has no configuration 'docvqa'; there are DocVQA, InfographicVQA"),
        (DECLARED, None, "test", "has several configurations and no default one; there are DocVQA, InfographicVQA"),
        (DECLARED, "DocVQA", "val", "configuration 'DocVQA' has no split 'val'; there are test, validation"),
        (CONVERTED, "de_de", "test", "configuration 'de_de' has no split 'test'; there are partial-test"),
        (LISTED, "pages", "train", "has no configuration 'pages'"),
    ],
)
def test_unknown_parts_are_named(
    tmp_path: Path, files: dict[str, str], config: str | None, split: str, message: str
) -> None:
    fill(tmp_path, files)
    with pytest.raises(EvaluationError) as error:
        open_source(HubDataset(repo="owner/name", config=config, split=split), tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: {message}")


def test_rows_run_through_files_and_row_groups(tmp_path: Path) -> None:
    rows = [
        {"id": i, "image": {"bytes": bytes([i]) * i, "path": f"{i}.png"}, "answers": [str(i)] * i} for i in range(23)
    ]
    for shard, part in enumerate((rows[:10], rows[10:11], rows[11:])):
        write(tmp_path / "data" / f"test-0000{shard}-of-00003.parquet", part, row_group_size=4)
    source = open_source(HubDataset(repo="owner/name"), tmp_path)
    assert [source[i] for i in range(23)] == rows
    assert [source[i] for i in (22, 0, 10, 3, 11)] == [rows[i] for i in (22, 0, 10, 3, 11)]
    assert source.directory is None
    for index in (-1, 23):
        with pytest.raises(IndexError):
            source[index]


def test_column_alone(tmp_path: Path) -> None:
    rows = [{"id": i, "text": str(i)} for i in range(9)]
    write(tmp_path / "data" / "test-00000-of-00002.parquet", rows[:5], row_group_size=2)
    write(tmp_path / "data" / "test-00001-of-00002.parquet", rows[5:])
    source = open_source(HubDataset(repo="owner/name"), tmp_path)
    assert source.column("text") == [row["text"] for row in rows]
    with pytest.raises(EvaluationError, match="no column 'answer'; there are id, text"):
        source.column("answer")


class Counting(LocalRepository):
    """Counts how often files are opened, from when they may be."""

    opened = 0
    gate = threading.Event()

    def open(self, path: str):
        type(self).opened += 1
        self.gate.wait(10)
        return super().open(path)


def test_threads_share_one_reading_of_a_row_group(tmp_path: Path) -> None:
    rows = [{"id": i, "text": str(i) * 100} for i in range(64)]
    write(tmp_path / "test.parquet", rows, row_group_size=8)
    Counting.gate.set()
    source = ParquetRows(Counting(tmp_path), ["test.parquet"], "rows")
    Counting.opened = 0
    Counting.gate.clear()
    with ThreadPoolExecutor(16) as pool:
        read = pool.map(source.__getitem__, range(64))
        Counting.gate.set()
        assert list(read) == rows
    assert Counting.opened == 8


@pytest.mark.parametrize("damage", ["not Parquet", "truncated", "in a row group"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "test.parquet"
    write(path, [{"id": i, "text": "x" * 50 * i} for i in range(50)])
    content = path.read_bytes()
    path.write_bytes(
        {
            "not Parquet": b"version https://git-lfs.github.com/spec/v1\n",
            "truncated": content[:-20] + content[-8:],
            "in a row group": b"PAR1" + b"\xff" * 300 + content[304:],
        }[damage]
    )
    with pytest.raises(EvaluationError, match="test.parquet: not a Parquet file, or a damaged one"):
        open_source(HubDataset(repo="owner/name"), tmp_path)[0]


# --- what stands for a task's own dataset --------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["owner/name", "name", "."])
def test_directory_may_hold_several_repositories(tmp_path: Path, inside: str) -> None:
    fill(tmp_path / inside, {"data/test.parquet": "right"})
    if inside != ".":
        fill(tmp_path / "owner" / "other", {"data/test.parquet": "wrong"})
    assert ids(open_source(HubDataset(repo="owner/name"), str(tmp_path))) == ["right"]


def test_another_repository_beside_is_not_taken(tmp_path: Path) -> None:
    fill(tmp_path / "other", {"data/test.parquet": "wrong"})
    with pytest.raises(EvaluationError, match="no default one; there are other"):
        open_source(HubDataset(repo="owner/name"), tmp_path)


def test_data_replaces_the_source(tmp_path: Path) -> None:
    fill(tmp_path, {"one.parquet": "parquet"})
    (tmp_path / "one.jsonl").write_text('{"id": "jsonl"}\n')
    (tmp_path / "one.csv").write_text("id\ncsv\n")
    for suffix in ("parquet", "jsonl", "csv"):
        path = tmp_path / f"one.{suffix}"
        for source in (open_source(HubDataset(repo="o/n"), path), open_source(path), open_source(Path("x"), path)):
            assert ids(source) == [suffix]
            assert source.description == str(path)


def test_own_directory_of_parquet_has_its_only_split(tmp_path: Path) -> None:
    fill(tmp_path, {"data/anything-00000-of-00001.parquet": "here"})
    assert ids(open_source(tmp_path)) == ["here"]
    fill(tmp_path, {"data/more-00000-of-00001.parquet": "there"})
    with pytest.raises(EvaluationError, match="has several splits; there are anything, more"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent/a/b", "no such file or directory; accepted: a JSONL, CSV or Parquet file, a directory, or"),
        ("notes.txt", "not a kind of dataset that can be read; accepted: .jsonl, .csv, .parquet"),
        ("empty", "holds no dataset; accepted: Parquet files, manifest.jsonl"),
    ],
)
def test_what_is_no_dataset(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(EvaluationError, match=message):
        open_source(HubDataset(repo="owner/name"), tmp_path / name)


def test_own_path_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=f"{tmp_path}/none.jsonl: no such file or directory"):
        open_source(tmp_path / "none.jsonl")


SPOKEN = HubDataset(repo="google/fleurs", config="de")
JOINED = JoinedDataset(
    rows=SPOKEN, counterparts=HubDataset(repo="google/fleurs", config="en"), columns={"translation": "text"}
)


def test_rows_are_joined_with_their_counterparts(tmp_path: Path) -> None:
    spoken = [{"id": id, "audio": {"bytes": bytes([id]), "path": None}, "text": f"de {id}"} for id in (3, 1, 1, 9, 2)]
    written = [
        {"id": id, "audio": None, "text": text} for id, text in [(1, "one"), (2, "two"), (1, "uno"), (3, "three")]
    ]
    write(tmp_path / "fleurs" / "de" / "test.parquet", spoken)
    write(tmp_path / "fleurs" / "en" / "test.parquet", written)
    source = open_source(JOINED, tmp_path)
    kept = [spoken[i] | {"translation": text} for i, text in enumerate(["three", "one", "one", None, "two"]) if text]
    assert [source[i] for i in range(len(source))] == kept
    assert list(source.columns) == ["id", "audio", "text", "translation"]
    for name in source.columns:
        assert source.column(name) == [row[name] for row in kept]
    write(tmp_path / "fleurs" / "en" / "test.parquet", [{"id": 7, "text": "seven"}])
    with pytest.raises(EvaluationError, match="no row has the 'id' of one of"):
        open_source(JOINED, tmp_path)


def test_rows_that_are_joined_already(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"audio": "a.wav", "text": "x", "translation": "y"}\n')
    assert open_source(JOINED, tmp_path / "own.jsonl")[0] == {"audio": "a.wav", "text": "x", "translation": "y"}


def test_task_without_rows_on_the_hub(tmp_path: Path) -> None:
    source = HubDataset(repo=None, config="docvqa")
    with pytest.raises(EvaluationError, match="docvqa: the hub has no such rows; name yours with --data"):
        open_source(source)
    (tmp_path / "ai2d.jsonl").write_text('{"id": "other"}\n')
    folder = tmp_path / "docvqa"
    folder.mkdir()
    (folder / "manifest.jsonl").write_text('{"id": "folder"}\n')
    assert ids(open_source(source, tmp_path)) == ["folder"]
    assert open_source(source, tmp_path).directory == folder
    (tmp_path / "docvqa.csv").write_text("id\ntable\n")
    assert ids(open_source(source, tmp_path)) == ["table"]
    assert open_source(source, tmp_path).directory == tmp_path


# --- manifests and folders -----------------------------------------------------------------------------------


def test_jsonl(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "prompt": "What?\u2028Say.", "answers": ["b", "c"]},
        {"audio_filepath": "b.wav", "duration": 1.5, "text": "hello"},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "own.jsonl").write_text("\ufeff" + "\r\n\n".join(lines), encoding="utf-8")
    source = open_source(tmp_path / "own.jsonl")
    assert [source[i] for i in range(len(source))] == rows
    assert source.directory == tmp_path
    assert source.columns == ["image", "prompt", "answers", "audio_filepath", "duration", "text"]


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text('audio,text,note\r\na.wav,"two\nlines, ""quoted""",\r\nb.wav,,x\r\n')
    source = open_source(tmp_path / "own.csv")
    assert [source[i] for i in range(len(source))] == [
        {"audio": "a.wav", "text": 'two\nlines, "quoted"'},
        {"audio": "b.wav", "note": "x"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": 1}\n\n{"id": 2\n', "a.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"id": 1}\n[1]\n', "a.jsonl, line 2: expected an object"),
        ("a.jsonl", b"\n", "a.jsonl: holds no rows"),
        ("a.jsonl", b'{"id": "\xff"}\n', "a.jsonl: cannot be read"),
        ("a.csv", b"id,text\n1,a\n2,b,c\n", "a.csv, line 3: has 3 cells, the header 2"),
        ("a.csv", b"id,id\n1,2\n", "a.csv, line 1: expected a header"),
        ("a.csv", b"id,\n1,2\n", "a.csv, line 1: expected a header"),
        ("a.csv", b'id,text\n1,"a\n', "a.csv, line 2: not valid CSV"),
        ("a.csv", b"id,text\n", "a.csv: holds no rows"),
        ("a.csv", b"", "a.csv: holds no rows"),
    ],
)
def test_damaged_manifests(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError) as error:
        open_source(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(error.value)


def test_folder_of_media_and_texts(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.WAV", "a.flac", "deep/c.v1.png", "deep/c.v1.ogg"):
        (tmp_path / name).touch()
    for name, text in (("a", " one\n"), ("b", "two"), ("deep/c.v1", ""), ("readme", "other")):
        (tmp_path / f"{name}.txt").write_text(text)
    source = open_source(tmp_path)
    assert [source[i] for i in range(len(source))] == [
        {"id": "a", "audio": "a.flac", "text": "one"},
        {"id": "b", "audio": "b.WAV", "text": "two"},
        {"id": "deep/c.v1", "audio": "deep/c.v1.ogg", "image": "deep/c.v1.png", "text": ""},
    ]
    assert source.directory == tmp_path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.wav", "b.wav", "b.txt"], "a.txt: cannot be read .*; expected the text of a.wav"),
        (["a.wav", "a.flac", "a.txt"], "a.wav: a.flac has the same name; one audio belongs to a text"),
        (["manifest.jsonl", "metadata.csv"], "has manifest.jsonl and metadata.csv; name the one that is meant"),
    ],
)
def test_folders_that_are_unclear(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(EvaluationError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "manifest.jsonl"])
def test_folder_with_a_manifest(tmp_path: Path, name: str) -> None:
    rows = [{"file_name": "x/a.wav", "text": "one"}, {"file_name": "b.jpg", "text": "two"}]
    as_csv = "file_name,text\nx/a.wav,one\nb.jpg,two\n"
    (tmp_path / name).write_text(as_csv if name.endswith("csv") else "\n".join(map(json.dumps, rows)))
    source = open_source(HubDataset(repo="owner/name"), tmp_path)
    assert [source[i] for i in range(2)] == [{**rows[0], "audio": "x/a.wav"}, {**rows[1], "image": "b.jpg"}]
    assert source.directory == tmp_path


# --- shards --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [0, 1, 7, 100])
@pytest.mark.parametrize("limit", [None, 1, 5, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shards_are_the_first_rows(total: int, limit: int | None, count: int) -> None:
    shards = [rows_of_shard(total, limit, (index, count)) for index in range(1, count + 1)]
    assert [row for shard in shards for row in shard] == list(range(total))[:limit]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(
    ("limit", "shard", "message"),
    [
        (None, (0, 2), "shard 0/2: expected I/N with I from 1 to N"),
        (None, (3, 2), "shard 3/2: expected"),
        (0, (1, 1), "limit 0: expected at least 1"),
    ],
)
def test_shards_that_are_none(limit: int | None, shard: tuple[int, int], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        rows_of_shard(10, limit, shard)
