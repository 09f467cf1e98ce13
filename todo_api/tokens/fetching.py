"""Fetches a small document, with a limit for its size and a limit for the whole time."""

import base64
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from todo_api.tokens.errors import KeySetError

MAX_BYTES = 64 * 1024
_TIMEOUT = 5.0  # seconds for the whole fetch; a lookup of the host and attempts to connect are not cut short
_CONNECT_TIMEOUT = 2.0  # seconds to connect to one address, so that the next one is tried; also for the TLS handshake
_HTTPS_PORT = 443
_HTTP_PORT = 80


def fetch(url: str) -> bytes:
    """Return the body of the response to a GET. A redirect is an error: it could lead anywhere.

    Raises:
        KeySetError: there is no response with the status 200 in time, or it is too large.

    """
    started = time.monotonic()
    parts = urlsplit(url)
    try:
        with closing(_connection(parts)) as connection:
            connection.connect()
            left = max(started + _TIMEOUT - time.monotonic(), 0.001)
            with _time_limit(connection.sock, left):
                target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
                connection.request("GET", target, headers={"Accept": "application/json", "Connection": "close"})
                response = connection.getresponse()
                body = response.read(MAX_BYTES + 1)
    except HTTPException as error:
        raise KeySetError(f"the response is invalid or incomplete ({type(error).__name__})") from error
    except (OSError, ValueError) as error:
        raise KeySetError(str(error) or type(error).__name__) from error
    if time.monotonic() > started + _TIMEOUT:
        raise KeySetError(f"the response is incomplete after {_TIMEOUT:.0f} s")
    if response.status != HTTPStatus.OK:
        raise KeySetError(f"the response has the status {response.status}")
    if len(body) > MAX_BYTES:
        raise KeySetError(f"the response is larger than {MAX_BYTES} bytes")
    return body


def _connection(url: SplitResult) -> HTTPConnection:
    """Return a connection that is not open yet. It leads through a proxy if the environment names one."""
    host, port = url.hostname or "", url.port
    if url.scheme == "http":  # the settings allow it for loopback addresses only
        return HTTPConnection(host, port, timeout=_CONNECT_TIMEOUT)
    named = "" if proxy_bypass(host) else getproxies().get("https", "")
    if not named:
        return HTTPSConnection(host, port, timeout=_CONNECT_TIMEOUT)
    proxy = urlsplit(named if "://" in named else f"http://{named}")
    if proxy.scheme != "http":
        raise KeySetError("the proxy in https_proxy is not an http:// URL")
    connection = HTTPSConnection(proxy.hostname or "", proxy.port or _HTTP_PORT, timeout=_CONNECT_TIMEOUT)
    credentials = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}"
    headers = {"Proxy-Authorization": f"Basic {base64.b64encode(credentials.encode()).decode()}"}
    connection.set_tunnel(host, port or _HTTPS_PORT, headers if proxy.username else {})
    return connection


@contextmanager
def _time_limit(sock: socket.socket, seconds: float) -> Iterator[None]:
    """End a connection if the block takes longer. A timeout of the socket would begin anew with each byte."""

    def end() -> None:
        with suppress(OSError):  # the connection has just been closed
            sock.shutdown(socket.SHUT_RDWR)

    sock.settimeout(seconds)
    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
