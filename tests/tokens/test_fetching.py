"""Fetching a key set over TLS: certificates, silent servers and proxies."""

import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.server.test_tls import CA
from tests.support.fixtures import Start
from tests.support.issuer import Issuer, SigningKey, bearer, running_issuer
from tests.support.optional_tools import program
from tests.support.processes import wait_until
from todo_api.tokens import fetching
from todo_api.tokens.errors import KeySetError

KEY = SigningKey()
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a new authority, ca.crt, and its certificate for localhost."""
    program("openssl")
    folder = tmp_path_factory.mktemp("certificates")
    subprocess.run(["sh", "-ec", CA], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def issuer(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Issuer]:
    """Run an issuer with TLS, whose certificate is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "ca.crt"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    with running_issuer(KEY) as running:
        running.server.socket = context.wrap_socket(running.server.socket, server_side=True)
        running.url = f"https://localhost:{running.server.server_port}/jwks?version=1"
        yield running


def assert_fails(url: str, reason: str) -> None:
    """Check that a fetch fails, and for which reason."""
    with pytest.raises(KeySetError, match=reason):
        fetching.fetch(url)


def test_a_key_set_is_fetched_over_tls(issuer: Issuer) -> None:
    assert b'"keys"' in fetching.fetch(issuer.url)
    assert issuer.fetches == ["/jwks?version=1"]


def test_a_certificate_must_be_trusted_and_of_the_host(
    issuer: Issuer, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_fails(issuer.url.replace("localhost", "127.0.0.1"), "certificate verify failed")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "server.crt"))
    assert_fails(issuer.url, "certificate verify failed")
    assert issuer.fetches == []


def test_a_worker_fetches_the_keys_over_tls_before_the_first_request(
    start: Start, database_url: str, issuer: Issuer, certificates: Path
) -> None:
    service = start(DATABASE_URL=database_url, SSL_CERT_FILE=certificates / "ca.crt", **issuer.settings()).wait()
    wait_until(lambda: len(issuer.fetches) == 1)
    assert service.client.get("/api/tasks?limit=1", headers=bearer(KEY.token())).status_code == 200
    assert len(issuer.fetches) == 1


def test_a_slow_response_over_tls_is_cut_off(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        with suppress(OSError):
            for _ in range(300):
                handler.wfile.write(b" ")
                time.sleep(0.1)

    issuer.respond = drip
    monkeypatch.setattr(fetching, "_TIMEOUT", 1.0)
    began = time.monotonic()
    assert_fails(issuer.url, "incomplete after 1 s")
    assert time.monotonic() - began < 20  # the drip takes 30


def test_no_more_is_read_than_a_key_set_may_have(issuer: Issuer) -> None:
    sent: list[int] = []

    def send_a_lot(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        with suppress(OSError):
            sent.extend(handler.wfile.write(b" " * 65_536) for _ in range(1000))

    issuer.respond = send_a_lot
    assert_fails(issuer.url, "larger than 65536 bytes")
    assert sum(sent) < 32 * 1024 * 1024  # what the kernel keeps for a connection


def test_a_server_that_accepts_and_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_CONNECT_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert_fails(f"https://127.0.0.1:{silent.getsockname()[1]}/", "timed out")


# ---- proxies


class Proxy(BaseHTTPRequestHandler):
    """A proxy that tunnels connections, and keeps the names of the hosts and the credentials."""

    seen: list[tuple[str, str | None]]

    def do_CONNECT(self) -> None:
        """Tunnel a connection to a port of this machine."""
        self.seen.append((self.path, self.headers["Proxy-Authorization"]))
        with socket.create_connection(("127.0.0.1", int(self.path.rpartition(":")[2]))) as upstream:
            self.send_response(200)
            self.end_headers()
            threading.Thread(target=self._copy, args=(upstream, self.connection), daemon=True).start()
            self._copy(self.connection, upstream)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def log_message(self, *_args: object) -> None:
        """Log nothing."""


@contextmanager
def running_proxy() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """Run a proxy, and return its address and what it has seen."""
    seen: list[tuple[str, str | None]] = []
    handler = type("Handler", (Proxy,), {"seen": seen})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", seen
        server.shutdown()


@pytest.mark.parametrize(
    ("before", "credentials"), [("", None), ("http://", None), ("http://me:h%40t@", "Basic bWU6aEB0")]
)
def test_a_proxy_of_the_environment_is_used(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch, before: str, credentials: str | None
) -> None:
    with running_proxy() as (address, seen):
        monkeypatch.setenv("https_proxy", before + address)
        assert b'"keys"' in fetching.fetch(issuer.url)
        assert seen == [(f"localhost:{issuer.server.server_port}", credentials)]


def test_no_proxy_is_used_for_the_hosts_of_no_proxy_and_for_loopback_addresses(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_proxy() as (address, seen), running_issuer(KEY) as plain:
        monkeypatch.setenv("http_proxy", address)
        monkeypatch.setenv("https_proxy", address)
        monkeypatch.setenv("no_proxy", "localhost")
        for url in (issuer.url, plain.url):
            assert b'"keys"' in fetching.fetch(url)
        assert seen == []


def test_a_proxy_that_is_not_http_is_an_error_and_not_ignored(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:9")
    assert_fails(issuer.url, "not an http:// URL")
    assert issuer.fetches == []
