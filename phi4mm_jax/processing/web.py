"""Downloads over http and https that cannot take more bytes or time than they may, nor reach into private networks."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

from phi4mm_jax.processing.display import shorten

_CHUNK = 1 << 16
_SILENCE_S = 10.0
"""How long a server may say nothing."""
_MAX_HOPS = 11
"""A URL and ten redirects."""
_REDIRECTS = (301, 302, 303, 307, 308)
_IPV4_IN_IPV6 = (("::ffff:0:0/96", 0), ("64:ff9b::/96", 0), ("2002::/16", 80))
"""Networks whose addresses lead to an IPv4 address (mapped, NAT64, 6to4), and the bits that follow it."""
_UNICAST = ipaddress.ip_network("2000::/3")
_PROTOCOL_ASSIGNMENTS = ipaddress.ip_network("192.0.0.0/24")
"""Private as a whole, of which older Pythons know a part; a cloud keeps its metadata there."""


class WebError(Exception):
    """A download failed; the message says why, without the URL."""


class TooLargeError(WebError):
    """There is more than the limit allows."""


def download(url: str, *, max_bytes: int, timeout_s: float, private_hosts: bool) -> bytes:
    """Fetches what a URL holds, through redirects.

    Args:
      url: of http or https; it may hold spaces and letters that ought to be escaped.
      max_bytes: most bytes of the content.
      timeout_s: most seconds from the call to the last byte, but for the time that the system takes to look up a name.
      private_hosts: whether to connect to addresses that are not globally routable, and to use the proxies that the
        environment names. Without, a connection is made to the very address that was checked, at every redirect, and
        never through a proxy, which would look names up by itself.

    Raises:
      TooLargeError: there is more; often found before it is fetched.
      WebError: anything else.
    """
    call = _Call(timeout_s, private_hosts)
    try:
        return _fetched(url, call, max_bytes)
    except urllib.error.URLError as error:
        reason: object = getattr(error.reason, "strerror", None) or error.reason
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error
    finally:
        call.end()
    raise WebError(f"cannot be fetched ({shorten(call.expiry() or reason)})")


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address is a globally routable one of a single host; IPv4 in IPv6 is seen through."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        return ip.is_global and not ip.is_multicast and ip not in _PROTOCOL_ASSIGNMENTS
    for network, shift in _IPV4_IN_IPV6:
        if ip in ipaddress.ip_network(network):
            return is_public(str(ipaddress.IPv4Address(int(ip) >> shift & 0xFFFFFFFF)))
    return ip in _UNICAST and ip.is_global


class _Call:
    """One download's permission to connect, and the clock that cuts its connections off when time is over."""

    def __init__(self, timeout_s: float, private_hosts: bool):
        self.private_hosts = private_hosts
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._lines: list[socket.socket] = []
        self._clock = threading.Timer(timeout_s, self._cut_off)
        self._clock.daemon = True
        self._clock.start()

    def patience(self) -> float:
        """Seconds that the next answer may take.

        Raises:
          TimeoutError: there is no time left.
        """
        if error := self.expiry():
            raise error
        return max(1e-3, min(_SILENCE_S, self._deadline - time.monotonic()))

    def expiry(self) -> TimeoutError | None:
        """The error that time is over, once it is."""
        return TimeoutError(f"more than {self._timeout_s:g} s") if time.monotonic() >= self._deadline else None

    def watch(self, line: socket.socket) -> None:
        """Has a connection cut off when time is over, also amid a handshake or a header that trickles in.

        Raises:
          TimeoutError: it is over.
        """
        self._lines.append(line.dup())  # TLS takes over the original
        self.patience()

    def connect(self, host: str, port: int) -> socket.socket:
        """Connects to a public host: to an address that was checked, and not to what a second look-up would give.

        Raises:
          WebError: one of its addresses is not public.
          OSError: the name is unknown, or none of its addresses answers.
        """
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not all(is_public(address[0]) for *_, address in found):
            raise WebError("leads to an address that is not public; accepted: URLs of public hosts")
        failure = OSError(f"{shorten(host)} has no address")
        for family, kind, protocol, _, address in found:
            line = socket.socket(family, kind, protocol)
            try:
                line.settimeout(self.patience())
                line.connect(address)
                return line
            except OSError as error:
                line.close()
                failure = error
        raise failure

    def end(self) -> None:
        self._clock.cancel()
        self._clock.join()  # or it might cut off what has the line's number next
        for line in self._lines:
            line.close()

    def _cut_off(self) -> None:
        for line in self._lines:
            try:
                line.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended by itself


class _Connection(http.client.HTTPConnection):
    """A connection that its download permits and watches."""

    call: _Call

    def connect(self) -> None:
        if self.call.private_hosts:
            super().connect()
        else:
            self.sock = self.call.connect(self.host, self.port)
        self.call.watch(self.sock)


class _TLSConnection(http.client.HTTPSConnection, _Connection):
    """The same under TLS: HTTPSConnection wraps what the next class connects, and checks the certificate's name."""


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens http and https URLs by the connections above."""

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def __init__(self, call: _Call):
        super().__init__()
        self._call = call

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(_Connection, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self._open(_TLSConnection, request)

    def _open(self, kind: type[_Connection], request: urllib.request.Request) -> http.client.HTTPResponse:
        def connection(*args: object, **settings: object) -> _Connection:
            made = kind(*args, **settings)
            made.call = self._call
            return made

        return self.do_open(connection, request)


def _fetched(url: str, call: _Call, max_bytes: int) -> bytes:
    """Follows redirects by hand: urllib's own reads their bodies, however long, and goes to ftp."""
    opener = urllib.request.OpenerDirector()
    opener.add_handler(_Handler(call))
    opener.add_handler(urllib.request.UnknownHandler())
    if call.private_hosts:
        opener.add_handler(urllib.request.ProxyHandler())
    url = _escaped(url, "utf-8")
    for _ in range(_MAX_HOPS):
        request = urllib.request.Request(url, headers={"User-Agent": "phi4mm_jax"})
        with opener.open(request, timeout=call.patience()) as response:
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or not location:
                return _content(response, call, max_bytes)
            url = urllib.parse.urljoin(url, _escaped(location, "iso-8859-1"))
    raise OSError(f"more than {_MAX_HOPS - 1} redirects")


def _escaped(url: str, encoding: str) -> str:
    return urllib.parse.quote(url, safe="!#$%&'()*+,/:;=?@[]~", encoding=encoding)


def _content(response: http.client.HTTPResponse, call: _Call, max_bytes: int) -> bytes:
    """Reads what comes, as it comes."""
    if not 200 <= response.status < 300:
        raise OSError(f"HTTP {response.status} {response.reason}")
    if int(response.headers.get("Content-Length") or 0) > max_bytes:
        raise TooLargeError
    data = bytearray()
    while chunk := response.read1(_CHUNK):
        data += chunk
        if len(data) > max_bytes:
            raise TooLargeError
        call.patience()
    call.patience()  # what was cut off ends like what is complete
    if response.length:  # what Content-Length promised and did not come
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(data)
