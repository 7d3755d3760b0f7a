"""Datasets on a local stand-in for the hub.

The real client speaks to it over HTTP, in a process of its own: the client reads its environment on import.
"""

import hashlib
import http.server
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

REPOSITORY = "owner/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONVERTED = "fedcba9876543210fedcba9876543210fedcba98"
ROW_GROUP = 5
ROWS = [{"id": i, "audio": {"bytes": hashlib.sha512(bytes([i])).digest() * 2000, "path": None}} for i in range(20)]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), content, row_group_size=ROW_GROUP, compression="none")
    return content.getvalue()


README = b"""---
configs:
- config_name: en
  data_files: [{split: test, path: "en/test-*"}]
- config_name: de
  data_files: [{split: test, path: "de/test-*"}, {split: dev, path: "de/dev-*"}]
---
"""
SHARDS = {"de/test-00000-of-00002.parquet": parquet(ROWS[:10]), "de/test-00001-of-00002.parquet": parquet(ROWS[10:])}
FILES = {"README.md": README, "en/test-00000-of-00001.parquet": parquet(ROWS[:1]), **SHARDS}


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves one dataset, by commit and path; `refuse` may fail a request, given the path of its URL."""

    daemon_threads = True

    def __init__(self):
        self.trees: dict[str, dict[str, bytes]] = {COMMIT: FILES}
        self.refuse: Callable[[str], tuple[int, str] | None] = lambda _: None
        self.tokens: set[str | None] = set()
        self.sent = Counter()
        """Bytes of files, by path."""
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value: Any) -> None:
        self.answer(json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        path = path.replace("%2F", "/")
        if REPOSITORY in path:  # the client also asks about itself
            self.server.tokens.add(self.headers["Authorization"])
        if refusal := self.server.refuse(path):
            status, code = refusal
            if status == 0:  # the connection breaks in the middle of the content
                self.send_response(206)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.close_connection = True
                return
            return self.answer(b"{}", status, X_Error_Code=code)
        revisions = {"refs/convert/parquet": CONVERTED, "main": COMMIT, COMMIT: COMMIT, CONVERTED: CONVERTED}
        if match := re.fullmatch(rf"/api/datasets/{REPOSITORY}(?:/revision/(.+))?", path):
            commit = revisions.get(match[1] or "main")
            if commit not in self.server.trees:
                return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
            self.answer_json({"id": REPOSITORY, "sha": commit, "siblings": []})
        elif match := re.fullmatch(rf"/api/datasets/{REPOSITORY}/tree/(\w+)/?(.*)", path):
            self.answer_json(self.tree(match[1], match[2], "recursive=true" in query.lower()))
        elif match := re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/(\w+)/(.+)", path):
            self.answer_file(match[2], self.server.trees[match[1]][match[2]])
        else:
            self.answer(b"{}", 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def tree(self, commit: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        entries = {}
        for name, content in self.server.trees[commit].items():
            if folder and not name.startswith(f"{folder}/"):
                continue
            depth = folder.count("/") + 1 if folder else 0
            parts = name.split("/")
            for end in range(depth + 1, len(parts) + 1 if recursive else depth + 2):
                path = "/".join(parts[:end])
                kind = {"type": "file", "size": len(content)} if path == name else {"type": "directory", "size": 0}
                entries[path] = {"path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), **kind}
        return list(entries.values())

    def answer_file(self, name: str, content: bytes) -> None:
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        start, end = (int(span[1]), int(span[2] or len(content) - 1) + 1) if span else (0, len(content))
        self.server.sent[name] += end - start
        extra = {"Content_Range": f"bytes {start}-{end - 1}/{len(content)}"} if span else {}
        self.answer(content[start:end], 206 if span else 200, X_Repo_Commit=COMMIT, ETag='"x"', **extra)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


READ = """
import json, sys
from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.evaluation.sources import open_source
from phi4mm_jax.evaluation.tasks.task import HubDataset
dataset, data, rows = json.loads(sys.argv[1])
try:
    source = open_source(HubDataset(**dataset), data)
    read = [source[i] for i in rows]
    digest = [[row["id"], row["audio"]["bytes"].hex()[:64]] for row in read]
    print(json.dumps({"rows": digest, "length": len(source), "description": source.description}))
except EvaluationError as error:
    print(json.dumps({"error": str(error)}))
"""


@pytest.fixture
def read(hub: FakeHub, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Opens a dataset and reads rows of it in a new process."""

    def read(
        rows: list[int], data: str | None = None, environment: dict[str, str] | None = None, **dataset: str
    ) -> dict[str, Any]:
        client = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        asked = json.dumps([{"repo": REPOSITORY, **dataset}, data, rows])
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", READ, asked],
            env=clean | client | (environment or {}),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return read


def expected(*indices: int) -> list[list[Any]]:
    return [[i, ROWS[i]["audio"]["bytes"].hex()[:64]] for i in indices]


def test_only_what_is_asked_for_is_fetched(hub: FakeHub, read: Callable) -> None:
    answer = read([11, 10], config="de", environment={"HF_TOKEN": "hf_secret"})
    assert answer["rows"] == expected(11, 10)
    assert answer["length"] == 20
    assert answer["description"] == f"owner/name@{COMMIT[:12]} (de, test)"
    assert hub.tokens == {"Bearer hf_secret"}
    first, second = SHARDS
    footers = 1 << 17  # the reader guesses where one begins
    assert hub.sent[first] <= footers < ROW_GROUP * 128_000
    assert ROW_GROUP * 128_000 <= hub.sent[second] <= ROW_GROUP * 128_000 + footers + 10_000
    assert hub.sent["en/test-00000-of-00001.parquet"] == 0


def test_another_repository_may_be_named(read: Callable) -> None:
    for data in (f"{REPOSITORY}:de:test", f"{REPOSITORY}:de", f"{REPOSITORY}::test"):
        assert read([3], data, repo="else/where", config="de")["rows"] == expected(3)
    assert read([0], f"{REPOSITORY}:en", repo="else/where", config="de")["length"] == 1


def test_converted_files_stand_in(hub: FakeHub, read: Callable) -> None:
    hub.trees = {
        COMMIT: {"README.md": README, "data/test.tar.gz": b"x"},
        CONVERTED: {"de/test/0000.parquet": parquet(ROWS[:4]), "de/test/0001.parquet": parquet(ROWS[4:])},
    }
    answer = read([3, 4], config="de")
    assert answer["rows"] == expected(3, 4)
    assert answer["description"] == f"owner/name@{CONVERTED[:12]} (de, test)"
    del hub.trees[CONVERTED]
    assert "holds no Parquet files, and the hub has not made any" in read([0], config="de")["error"]


@pytest.mark.parametrize("refusal", [(503, ""), (429, ""), (0, "")])
def test_hiccups_are_survived(hub: FakeHub, read: Callable, refusal: tuple[int, str]) -> None:
    left = [2]

    def refuse(path: str) -> tuple[int, str] | None:
        if path.endswith("00001-of-00002.parquet") and left[0]:
            left[0] -= 1
            return refusal
        return None

    hub.refuse = refuse
    assert read([12], config="de")["rows"] == expected(12)
    assert left == [0]


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "GatedRepo"), "owner/name: access is restricted; accept the terms on its page on the hub, then run"),
        ((404, "RepoNotFound"), "owner/name: no such dataset on the hub (or a private one: set HF_TOKEN)"),
        ((404, "RevisionNotFound"), "owner/name: the dataset has no revision 'v2'; expected a branch, tag or commit"),
        ((400, ""), "owner/name: the hub cannot be read ("),
    ],
)
def test_refusals_are_explained(hub: FakeHub, read: Callable, refusal: tuple[int, str], message: str) -> None:
    hub.refuse = lambda _: refusal
    error = read([0], config="de", revision="v2")["error"]
    assert error.startswith(message)
    assert "\n" not in error


def test_gate_before_the_files(hub: FakeHub, read: Callable) -> None:
    hub.refuse = lambda path: (403, "GatedRepo") if "/resolve/" in path else None
    assert read([0], config="de")["error"].startswith("owner/name: access is restricted")


def test_names_that_are_none(read: Callable) -> None:
    assert read([0], "ow--ner/na..me")["error"].startswith("ow--ner/na..me: not a valid name of a dataset")
    error = read([0], config="fr")["error"]
    assert error == "owner/name: has no configuration 'fr'; there are de, en"


def test_offline_the_cache_is_read(hub: FakeHub, read: Callable, tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1"}
    assert (
        "not in the hub's cache, and fetching is switched off" in read([0], config="de", environment=offline)["error"]
    )
    repository = tmp_path / "home" / "hub" / "datasets--owner--name"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for i, (name, content) in enumerate(FILES.items()):
        blob = repository / "blobs" / str(i)
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    assert read([12], config="de", environment=offline)["rows"] == expected(12)
    assert not hub.sent
