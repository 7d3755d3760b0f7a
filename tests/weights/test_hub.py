"""Resolution against a local stand-in for the Hub.

The real client speaks to it over HTTP, in a process of its own: the client reads its environment on import.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phi4mm_jax.weights.hub import HubError, resolve

REPOSITORY = "owner/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = "model.safetensors.index.json"
FOLDERS = [f"{adapter}-lora/adapter_model.safetensors" for adapter in ("vision", "speech")]


def index(*extra: str) -> bytes:
    names = ["model.norm.weight", *extra]
    return json.dumps({"weight_map": {n: f"model-{i:05}.safetensors" for i, n in enumerate(names)}}).encode()


ADAPTERS = [f"model.layers.0.mlp.down_proj.lora_A.{adapter}.weight" for adapter in ("vision", "speech")]


def files(*names: str) -> dict[str, bytes]:
    """Contents differ, or else the cache would share one blob."""
    return {name: name.encode() for name in (*names, *FOLDERS)}


COMMON = ("config.json", "tokenizer.json", "README.md", "model-00000.safetensors")
HUB = files(*COMMON, "model-00001.safetensors", "model-00002.safetensors") | {INDEX: index(*ADAPTERS)}
NATIVE = files(*COMMON) | {INDEX: index()}
SINGLE = files("config.json", "model.safetensors", "other.safetensors")


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves one repository; `refusal`, a status and an error code, makes every request fail."""

    daemon_threads = True

    def __init__(self):
        self.files: dict[str, bytes] = HUB
        self.refusal: tuple[int, str] | None = None
        self.fetched: set[str] = set()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.server.refusal:
            status, code = self.server.refusal
            self.answer(b"{}", status, X_Error_Code=code)
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode())
        elif (name := path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")) in self.server.files:
            data = self.server.files[name]
            if self.command == "GET":
                self.server.fetched.add(name)
            self.answer(data, X_Repo_Commit=COMMIT, ETag=f'"{hashlib.sha1(data).hexdigest()}"')
        else:
            self.answer(b"{}", 404)

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


RESOLVE = """
import json, sys
from phi4mm_jax.weights.hub import HubError, resolve
try:
    print(json.dumps([str(resolve(sys.argv[1], **json.loads(sys.argv[2]))), None]))
except HubError as error:
    print(json.dumps([None, str(error)]))
"""


@pytest.fixture
def resolve_fresh(hub: FakeHub, tmp_path: Path) -> Callable[..., tuple[str | None, str | None]]:
    """Runs `resolve` in a new process; returns the directory or the error's message."""

    def resolve_fresh(environment: dict[str, str] | None = None, **options) -> tuple[str | None, str | None]:
        client = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        arguments = [sys.executable, "-c", RESOLVE, REPOSITORY, json.dumps(options)]
        result = subprocess.run(
            arguments, env=clean | client | (environment or {}), capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, result.stderr
        return tuple(json.loads(result.stdout))

    return resolve_fresh


@pytest.mark.parametrize(
    ("repository", "unneeded"),
    [
        (HUB, {"README.md", *FOLDERS}),
        (NATIVE, {"README.md"}),
        (SINGLE, {"other.safetensors"}),
    ],
)
def test_only_what_is_needed_is_fetched(
    hub: FakeHub, resolve_fresh: Callable, repository: dict[str, bytes], unneeded: set[str]
) -> None:
    hub.files = repository
    folder, error = resolve_fresh(revision="refs/pr/70")
    assert error is None
    assert hub.fetched == repository.keys() - unneeded
    assert Path(folder).name == COMMIT
    assert all((Path(folder) / name).read_bytes() == repository[name] for name in hub.fetched)


def test_cache_serves_offline(hub: FakeHub, resolve_fresh: Callable) -> None:
    folder, _ = resolve_fresh()
    hub.fetched.clear()
    hub.refusal = (400, "")
    assert resolve_fresh(local_files_only=True) == (folder, None)
    assert resolve_fresh({"HF_HUB_OFFLINE": "1"}) == (folder, None)
    assert not hub.fetched
    (Path(folder) / "model-00001.safetensors").unlink()
    _, error = resolve_fresh(local_files_only=True)
    assert "model-00001.safetensors not in" in error or "not in the cache" in error


def test_repository_lacks_a_shard(hub: FakeHub, resolve_fresh: Callable) -> None:
    hub.files = {name: data for name, data in HUB.items() if name != "model-00002.safetensors"}
    _, error = resolve_fresh()
    assert error.startswith(f"{REPOSITORY}: model-00002.safetensors not in")


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "RepoNotFound"), "no such repository on the Hub"),
        ((404, "RevisionNotFound"), "the repository has no revision 'v9'; expected a branch, tag or commit"),
        ((403, "GatedRepo"), "access is restricted; accept the terms"),
        ((400, ""), "the Hub can't be reached"),
    ],
)
def test_refusals(hub: FakeHub, resolve_fresh: Callable, refusal: tuple[int, str], message: str) -> None:
    hub.refusal = refusal
    _, error = resolve_fresh(revision="v9")
    assert error.startswith(f"{REPOSITORY}: ")
    assert message in error
    assert "\n" not in error


def test_no_connection(resolve_fresh: Callable) -> None:
    _, error = resolve_fresh({"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert error.startswith(f"{REPOSITORY}: the Hub can't be reached (")
    assert error.endswith("name a local directory, or fill the cache elsewhere and set HF_HUB_OFFLINE=1")


def test_empty_cache_offline(resolve_fresh: Callable) -> None:
    expected = (
        f"{REPOSITORY}: not in the cache, and fetching is switched off; go online once, or name a local directory"
    )
    assert resolve_fresh(local_files_only=True) == (None, expected)
    assert resolve_fresh({"HF_HUB_OFFLINE": "1"}) == (None, expected)


def test_directories(tmp_path: Path) -> None:
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    for name in ("./absent", "absent", str(tmp_path / "absent"), "~/absent", "a/b/c"):
        with pytest.raises(HubError, match="no such directory"):
            resolve(name)
    with pytest.raises(HubError, match="not a valid repository name"):
        resolve("two words/model")


def test_the_bundled_model_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (resolve("nano") / "config.json").is_file()
    monkeypatch.chdir(tmp_path)
    Path("nano").mkdir()
    assert resolve("nano") == Path("nano")  # a directory of that name goes first
