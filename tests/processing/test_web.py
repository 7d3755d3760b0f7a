"""Downloads against servers that mean harm. 127.0.0.1 plays the public host, 127.0.0.2 the private one."""

import contextlib
import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phi4mm_jax.processing import web
from phi4mm_jax.processing.web import TooLargeError, WebError, download, is_public

CONTENT = bytes(range(256)) * 4
PUBLIC, PRIVATE = "127.0.0.1", "127.0.0.2"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves what each path names."""

    def do_GET(self) -> None:
        self.server.asked.append((self.headers["Host"], self.path))
        name, _, target = self.path.strip("/").partition("?")
        with contextlib.suppress(OSError):  # the client gave up, as it should
            if name == "trickling_header":
                self.wfile.write(b"HTTP/1.1 200 OK\r\n")
                while True:
                    self.wfile.write(b"X: y\r\n")
                    time.sleep(0.05)
            self.send_response(302 if name in ("to", "to_endless", "loop") else 200)
            if name in ("to", "to_endless"):
                self.send_header("Location", target)
            elif name == "loop":
                self.send_header("Location", "/loop")
            elif name == "declares_2GB":
                self.send_header("Content-Length", str(2**31))
            self.end_headers()
            if name == "content":
                self.wfile.write(CONTENT)
            while name in ("endless", "to_endless", "declares_2GB"):
                self.wfile.write(bytes(1 << 16))

    def log_message(self, *_: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True  # those that serve without end

    def __init__(self, host: str, port: int = 0, context: ssl.SSLContext | None = None) -> None:
        super().__init__((host, port), Handler)
        self.asked: list[tuple[str, str]] = []
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)

    def handle_error(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def public() -> Iterator[Server]:
    with running(Server(PUBLIC)) as server:
        yield server


@pytest.fixture
def private() -> Iterator[Server]:
    with running(Server(PRIVATE)) as server:
        yield server


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Name -> addresses, of which every look-up takes the next; 127.0.0.1 counts as public."""
    table: dict[str, list[str]] = {}
    look_up = socket.getaddrinfo

    def fake(host: str, port: int, *args: object, **settings: object) -> list:
        if host in table:
            host = table[host].pop(0) if len(table[host]) > 1 else table[host][0]
        return [entry for part in host.split("+") for entry in look_up(part, port, *args, **settings)]

    monkeypatch.setattr(socket, "getaddrinfo", fake)
    monkeypatch.setattr(web, "is_public", lambda address: address == PUBLIC or is_public(address))
    return table


def fetch(url: str, *, max_bytes: int = 10_000, timeout_s: float = 5.0, private_hosts: bool = False) -> bytes:
    return download(url, max_bytes=max_bytes, timeout_s=timeout_s, private_hosts=private_hosts)


def assert_refused(url: str, *, accepted: str = "leads to an address that is not public; accepted: URLs of") -> None:
    with pytest.raises(WebError, match=accepted):
        fetch(url)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.0.192", "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "4000::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "::127.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b::a00:1", "64:ff9b:1::808:808", "2002:7f00:1::", "2002:a9fe:a9fe::1"),
        *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "fec0::1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "0", "0.0.0.0"),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "127.0.0.1.", "169.254.169.254", "%31%32%37.0.0.1"),
    ],
)
def test_spellings_of_private_hosts(public: Server, host: str) -> None:
    with pytest.raises(WebError, match="not public|cannot be fetched .*(not known|address)"):
        fetch(f"http://{host}:{public.server_port}/content")
    assert not public.asked


def test_a_public_host_is_fetched(public: Server, names: dict) -> None:
    names["public.example"] = [PUBLIC]
    assert fetch(f"http://public.example:{public.server_port}/content") == CONTENT
    assert fetch(f"http://public.example:{public.server_port}/to?/content") == CONTENT
    assert {host for host, _ in public.asked} == {f"public.example:{public.server_port}"}


def test_a_name_of_a_private_address(private: Server, names: dict) -> None:
    names |= {"inside.example": [PRIVATE], "both.example": [f"{PUBLIC}+{PRIVATE}"]}
    for host in names:
        assert_refused(f"http://{host}:{private.server_port}/content")
    assert not private.asked


def test_redirects_are_checked(public: Server, private: Server, names: dict) -> None:
    names |= {"public.example": [PUBLIC], "inside.example": [PRIVATE]}
    for target in (PRIVATE, "inside.example"):
        url = f"http://{target}:{private.server_port}/content"
        assert_refused(f"http://public.example:{public.server_port}/to?{url}")
        assert fetch(url, private_hosts=True) == CONTENT  # it is there
    assert len(private.asked) == 2


def test_a_name_that_changes_its_address(public: Server, names: dict) -> None:
    with running(Server(PRIVATE, public.server_port)) as trap:  # where a second look-up would lead
        names["rebinding.example"] = [PUBLIC, PRIVATE]
        assert fetch(f"http://rebinding.example:{public.server_port}/content") == CONTENT
        names["rebinding.example"] = [PUBLIC, PRIVATE]
        assert_refused(f"http://rebinding.example:{public.server_port}/to?/content")  # looked up anew, and seen
        assert not trap.asked


def test_proxies_are_ignored_unless_private_hosts_are_allowed(
    private: Server, names: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{PRIVATE}:{private.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    names["public.example"] = [PUBLIC]
    with pytest.raises(WebError, match="cannot be fetched .*refused"):
        fetch("http://public.example:9/content")
    assert not private.asked
    fetch("http://public.example:9/content", private_hosts=True)
    assert private.asked == [("public.example:9", "http://public.example:9/content")]


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:,x", "gopher://127.0.0.1/"])
def test_redirects_stay_on_the_web(public: Server, names: dict, target: str) -> None:
    assert_refused(f"http://{PUBLIC}:{public.server_port}/to?{target}", accepted="cannot be fetched .unknown url type")


@pytest.mark.parametrize("name", ["endless", "declares_2GB", "to_endless?/endless"])
def test_streams_without_end(public: Server, names: dict, name: str) -> None:
    began = time.monotonic()
    with pytest.raises(TooLargeError):
        fetch(f"http://{PUBLIC}:{public.server_port}/{name}")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("private_hosts", [False, True])
@pytest.mark.parametrize("name", ["trickling_header", "endless"])
def test_time_is_limited(public: Server, names: dict, name: str, private_hosts: bool) -> None:
    began = time.monotonic()
    with pytest.raises(WebError, match=r"cannot be fetched \(more than 0\.4 s\)"):
        fetch(
            f"http://{PUBLIC}:{public.server_port}/{name}", max_bytes=10**12, timeout_s=0.4, private_hosts=private_hosts
        )
    assert time.monotonic() - began < 2


def test_a_silent_handshake_is_cut_off(names: dict) -> None:
    with socket.create_server((PUBLIC, 0)) as listener:
        began = time.monotonic()
        with pytest.raises(WebError, match=r"more than 0\.3 s"):
            fetch(f"https://{PUBLIC}:{listener.getsockname()[1]}/", timeout_s=0.3)
        assert time.monotonic() - began < 2


def test_redirects_are_counted(public: Server, names: dict) -> None:
    assert_refused(f"http://{PUBLIC}:{public.server_port}/loop", accepted="cannot be fetched .more than 10 redirects")
    assert len(public.asked) == 11


def test_the_clock_stops_with_the_download(public: Server, names: dict) -> None:
    fetch(f"http://{PUBLIC}:{public.server_port}/content")
    assert not [t for t in threading.enumerate() if isinstance(t, threading.Timer)]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The key of a server; its certificate, of public.example, is the .crt beside it."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate")
    path = tmp_path_factory.mktemp("tls") / "server.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=public.example", "-addext", "subjectAltName=DNS:public.example"),
            *("-keyout", str(path), "-out", str(path.with_suffix(".crt"))),
        ],
        check=True,
        capture_output=True,
    )
    return path


def test_certificates_are_of_the_name(certificate: Path, names: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    names |= {"public.example": [PUBLIC], "other.example": [PUBLIC]}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.with_suffix(".crt"), certificate)
    with running(Server(PUBLIC, context=context)) as server:
        url = f"https://public.example:{server.server_port}/content"
        with pytest.raises(WebError, match="certificate"):
            fetch(url)  # nobody vouches for it
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
        for private_hosts in (False, True):
            assert fetch(url, private_hosts=private_hosts) == CONTENT
            with pytest.raises(WebError, match=r"alid for 'other\.example'"):
                fetch(url.replace("public", "other"), private_hosts=private_hosts)
