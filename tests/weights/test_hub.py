"""Resolution against a local stand-in for the Hub, spoken to over HTTP by the real client."""

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
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
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as server:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.parametrize(
    ("repository", "unneeded"),
    [
        (HUB, {"README.md", *FOLDERS}),
        (NATIVE, {"README.md"}),
        (SINGLE, {"other.safetensors"}),
    ],
)
def test_only_what_is_needed_is_fetched(hub: FakeHub, repository: dict[str, bytes], unneeded: set[str]) -> None:
    hub.files = repository
    folder = resolve(REPOSITORY, revision="refs/pr/70")
    assert hub.fetched == repository.keys() - unneeded
    assert folder.name == COMMIT
    assert all((folder / name).read_bytes() == repository[name] for name in hub.fetched)


def test_cache_serves_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve(REPOSITORY)
    hub.fetched.clear()
    hub.refusal = (500, "")
    assert resolve(REPOSITORY, local_files_only=True) == folder
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve(REPOSITORY) == folder
    assert not hub.fetched


def test_incomplete_cache(hub: FakeHub) -> None:
    (resolve(REPOSITORY) / "model-00001.safetensors").unlink()
    with pytest.raises(HubError, match=r"model-00001\.safetensors|not in the cache"):
        resolve(REPOSITORY, local_files_only=True)


def test_not_on_the_hub_in_full(hub: FakeHub) -> None:
    hub.files = {name: data for name, data in HUB.items() if name != "model-00002.safetensors"}
    with pytest.raises(HubError, match=r"model-00002\.safetensors not in"):
        resolve(REPOSITORY)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "RepoNotFound"), "no such repository on the Hub"),
        ((404, "RepoNotFound"), "no such repository on the Hub"),
        ((404, "RevisionNotFound"), "the repository has no revision 'v9'; expected a branch, tag or commit"),
        ((403, "GatedRepo"), "access is restricted; accept the terms"),
        ((400, ""), "the Hub can't be reached"),
    ],
)
def test_refusals(hub: FakeHub, refusal: tuple[int, str], message: str) -> None:
    hub.refusal = refusal
    with pytest.raises(HubError, match=f"^{REPOSITORY}: .*{message}") as error:
        resolve(REPOSITORY, revision="v9")
    assert "\n" not in str(error.value)


def test_no_connection(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"the Hub can't be reached \(.*\); if this machine is offline, name a local"):
        resolve(REPOSITORY)


@pytest.mark.parametrize(
    "switch_off", [lambda m: {"local_files_only": True}, lambda m: m("HF_HUB_OFFLINE", True) or {}]
)
def test_empty_cache_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, switch_off: Callable) -> None:
    options = switch_off(lambda name, value: monkeypatch.setattr(huggingface_hub.constants, name, value))
    with pytest.raises(HubError, match="not in the cache, and fetching is switched off"):
        resolve(REPOSITORY, **options)


def test_directories(tmp_path: Path) -> None:
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    for name in ("./absent", "absent", str(tmp_path / "absent"), "~/absent", "a/b/c"):
        with pytest.raises(HubError, match="no such directory"):
            resolve(name)
    with pytest.raises(HubError, match="not a valid repository name"):
        resolve("two words/model")
