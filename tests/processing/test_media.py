import base64
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi4mm_jax.processing.media import MediaLimits, describe, read
from phi4mm_jax.processing.prompt import MediaError

CONTENT = bytes(range(256)) * 4


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves what each path names."""

    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name == "moved":
            self.send_response(302)
            self.send_header("Location", "/content")
        elif name in ("to_file", "to_ftp"):
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname" if name == "to_file" else "ftp://127.0.0.1/x")
        elif name == "missing":
            self.send_response(404)
        elif name == "short":
            self.send_response(200)
            self.send_header("Content-Length", str(2 * len(CONTENT)))
        else:
            self.send_response(200)
        self.end_headers()
        try:
            if name in ("content", "short", "with%20space"):
                self.wfile.write(CONTENT)
            elif name == "trickle":
                for _ in range(50):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        except OSError:
            pass  # the client gave up, as it should

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file, with %41 ünusual name"
    path.write_bytes(CONTENT)
    return path


def test_files_and_bytes(file: Path, limits: MediaLimits) -> None:
    for source in (file, str(file), file.as_uri(), file.as_uri().replace("file://", "file://localhost")):
        assert read(source, limits) == CONTENT
    for source in (CONTENT, bytearray(CONTENT), memoryview(CONTENT)):
        assert read(source, limits) == CONTENT


def test_data_urls(limits: MediaLimits) -> None:
    encoded = base64.b64encode(CONTENT).decode()
    assert read(f"data:image/png;base64,{encoded}", limits) == CONTENT
    assert read(f"DATA:;base64,{encoded[:50]}\n {encoded[50:]}", limits) == CONTENT
    assert read(f"data:;base64,{encoded.replace('=', '%3D')}", limits) == CONTENT
    assert read("data:text/plain,a%20b%ff", limits) == b"a b\xff"


def test_http(server: str, limits: MediaLimits) -> None:
    for name in ("content", "moved", "with space"):
        assert read(f"{server}/{name}", limits) == CONTENT


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing", "cannot be fetched .HTTP 404"),
        ("short", "cannot be fetched .*more expected"),
        ("trickle", r"cannot be fetched \(more than 0\.3 s"),
        ("empty", "is empty"),
        ("to_file", "cannot be fetched"),
        ("to_ftp", "cannot be fetched"),
    ],
)
def test_http_failures(server: str, name: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(MediaError, match=message):
        read(f"{server}/{name}", MediaLimits(timeout_s=0.3))
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:9/x", "http://", "http://host.invalid/x", "http://[::1/x", "http://a b/"),
        *("http://a\r\nb/", "http://a/\ud800"),
    ],
)
def test_unreachable(url: str) -> None:
    with pytest.raises(MediaError, match=r"^http.*: cannot be fetched \(.+\)$") as caught:
        read(url, MediaLimits(timeout_s=2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source, message",
    [
        ("/no/such/file.png", "/no/such/file.png: no such file"),
        ("/", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("a\0b", "no such file"),
        ("x" * 5000, "File name too long"),
        ("", "^'': (no such file|not a regular file)"),
        ("file://elsewhere/a.png", "of this machine"),
        ("file://[::1/a.jpg", r"^file://\[::1/a\.jpg: not a valid URL \(Invalid IPv6 URL\)$"),
        ("file:///a%00b", "no such file"),
        ("a\nb\x1b.png", r"^a\\nb\\x1b\.png: no such file$"),
        ("a\ud800.png", r"^a\\ud800\.png: no such file$"),
        ("data:,\ud800", "lone surrogates"),
        ("ftp://a/b", "unknown kind of URL; accepted: http, https, file, data"),
        ("data:image/png;base64", "expected data:"),
        ("data:image/png;base64,!!!!", "not valid base64"),
        ("data:,", "is empty"),
        (b"", "is empty"),
        (3, "expected a path, a URL or bytes"),
        (None, "expected a path, a URL or bytes"),
    ],
)
def test_bad_sources(source: object, message: str, limits: MediaLimits) -> None:
    with pytest.raises(MediaError, match=message):
        read(source, limits)


def test_size_is_limited(server: str, file: Path) -> None:
    limits = MediaLimits(max_bytes=1000)
    encoded = base64.b64encode(CONTENT).decode()
    for source in (CONTENT, file, f"{server}/content", f"data:;base64,{encoded}", "data:," + "a" * 1001):
        with pytest.raises(MediaError, match=r"larger than the limit of 0\.001 MB"):
            read(source, limits)


def test_local_files_can_be_forbidden(file: Path, server: str) -> None:
    limits = MediaLimits(local_files=False)
    for source in (str(file), file, file.as_uri()):
        with pytest.raises(MediaError, match="local files are not allowed"):
            read(source, limits)
    assert read(CONTENT, limits) == read(f"{server}/content", limits) == CONTENT


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with files, links into it and out of it, and a secret beside it."""
    inside = tmp_path / "media"
    (inside / "deep").mkdir(parents=True)
    for path in (inside / "a.png", inside / "deep" / "b.png", tmp_path / "secret", tmp_path / "media-not" / "c"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(CONTENT)
    (inside / "link").symlink_to(inside / "a.png")
    (inside / "escape").symlink_to(tmp_path / "secret")
    (inside / "up").symlink_to("..")
    (inside / "loop").symlink_to("loop")
    (tmp_path / "entrance").symlink_to(inside)
    return inside


def test_files_under_a_directory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    entrance = directory.parent / "entrance"
    for allowed in (directory, entrance, Path()):
        limits = MediaLimits(directory=allowed)
        for source in (
            *(directory / "a.png", str(directory / "deep" / "b.png"), (directory / "deep" / "b.png").as_uri()),
            *(directory / "link", entrance / "a.png", f"file://{directory}/deep/../a.png", "a.png", "deep/../link"),
            *(f"file://{directory}/deep/%2e%2e/a.png", f"{directory}/up/media/a.png"),
        ):
            assert read(source, limits) == CONTENT


def test_files_elsewhere(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    limits = MediaLimits(directory=directory)
    outside = directory.parent
    for source in (
        *(outside / "secret", f"file://{outside}/secret", f"{directory}/../secret", "../secret", "up/secret"),
        *(directory / "escape", directory / "up" / "secret", "escape", outside / "media-not" / "c", "/etc/hostname"),
        *(f"file://{directory}/%2e%2e/secret", f"file://{directory}/%2E%2E%2Fsecret", f"file://{directory}/up/secret"),
        *("/no/such/file", "../nothing", f"{directory}/a.png/../../secret", bytes(outside / "secret").decode()),
    ):
        with pytest.raises(MediaError, match=": lies elsewhere; accepted: files under /.*/media$"):
            read(source, limits)
    for source, message in (("nothing", "no such file"), ("loop", "loop|no such file"), ("", "not a regular file")):
        with pytest.raises(MediaError, match=message):
            read(source, limits)
    for source in ("a\0b", "file:///a%00b"):
        with pytest.raises(MediaError, match="no such file"):
            read(source, limits)
    with pytest.raises(MediaError, match="local files are not allowed"):
        read("a.png", MediaLimits(local_files=False, directory=directory))


def test_private_hosts_can_be_forbidden(server: str) -> None:
    with pytest.raises(MediaError, match=rf"^{server}/content: leads to an address that is not public; accepted: URLs"):
        read(f"{server}/content", MediaLimits(private_hosts=False))


def test_names_in_messages_are_short() -> None:
    assert describe("data:image/png;base64," + "A" * 1000) == "data:image/png;base64,..."
    assert describe("x" * 1000 + ".png") == "x" * 98 + "..." + "x" * 95 + ".png"
    assert describe(Path("a\r\nb")) == "a\\r\\nb"
    assert describe(b"abc") == "3 bytes"
    assert describe(7) == "int"
