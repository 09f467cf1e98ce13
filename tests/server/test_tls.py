"""TLS to PostgreSQL: the certificates that the system trusts, and a psql without TLS."""

import os
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.commands import FLASK, flask, message
from tests.support.environment import ROOT, environment
from tests.support.fixtures import Start
from tests.support.optional_tools import missing, program
from tests.support.postgres import Postgres
from tests.support.processes import wait_until
from tests.support.relay import SlowRelay
from todo_api import embedded
from todo_api.embedded import programs

STORE = Path("/etc/ssl/certs/ca-certificates.crt")
CA = """
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9 -subj /CN=ca -keyout ca.key -out ca.crt
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -keyout server.key -out server.csr
printf subjectAltName=DNS:localhost > names
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 9 -extfile names -out server.crt
"""


class TlsRelay(SlowRelay):
    """A relay that speaks TLS with its clients, as the proxies of hosts do."""

    context: ssl.SSLContext

    def secure(self, client: socket.socket) -> socket.socket:
        """Return the socket with TLS."""
        client.sendall(b"S")
        return self.context.wrap_socket(client, server_side=True)


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[TlsRelay]:
    """Run a PostgreSQL behind TLS with a certificate of a new authority, whose certificate is ca.crt."""
    with postgres_with_tls(tmp_path) as relay:
        yield relay


@contextmanager
def postgres_with_tls(folder: Path, postgres_bin: Path | None = None) -> Iterator[TlsRelay]:
    """Run a PostgreSQL behind TLS during a block, and create the certificates in a folder."""
    program("openssl")
    subprocess.run(["sh", "-ec", CA], cwd=folder, check=True, capture_output=True)
    postgres = Postgres(folder / "server", postgres_bin)
    relay = TlsRelay(postgres.conninfo)
    relay.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    relay.context.load_cert_chain(folder / "server.crt", folder / "server.key")
    yield relay
    relay.close()
    postgres.stop()


def in_store(*certificates: Path, folder: Path) -> list[str]:
    """Return a prefix that runs a command on a system that trusts only these certificates."""
    if not STORE.exists():
        missing(f"there is no {STORE}")
    program("unshare")
    store = folder / "store.crt"
    store.write_bytes(b"".join(certificate.read_bytes() for certificate in certificates))
    users = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", "--mount", *users, "sh", "-c", f'mount --bind "$0" {STORE} && exec "$@"', str(store)]


def test_the_certificates_of_the_system_are_found(
    relay: TlsRelay, tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):  # with these, OpenSSL finds them by itself
        monkeypatch.delenv(variable, raising=False)
    url = f"postgresql://postgres@localhost:{relay.port}/postgres?sslrootcert=system"
    service = start(DATABASE_URL=url, prefix=in_store(tmp_path / "ca.crt", folder=tmp_path)).wait()
    assert service.client.post("/api/tasks", json={"title": "Buy milk"}).status_code == httpx.codes.CREATED
    assert service.stop() == 0
    stranger = start(DATABASE_URL=url)
    wait_until(lambda: stranger.answers("/healthz"))
    assert not stranger.answers()
    assert "certificate verify failed" in stranger.log()
    # SSL_CERT_FILE takes precedence.
    chosen = start(DATABASE_URL=url, SSL_CERT_FILE=tmp_path / "ca.crt").wait()
    assert [stranger.stop(), chosen.stop()] == [0, 0]


@pytest.fixture
def broken_psql(tmp_path: Path) -> Path:
    """Return a folder with a psql that fails, as Debian's does without a client package."""
    script = tmp_path / "bin" / "psql"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho 'Error: You must install at least one postgresql-client package' >&2\nexit 1\n")
    script.chmod(0o755)
    return script.parent


def test_a_psql_that_fails_is_not_used(broken_psql: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(broken_psql))
    assert embedded.psql() == str(programs.find(None).folder / "psql")


def test_a_backup_over_tls_needs_a_pg_dump_with_tls_and_a_restore_does_not(
    relay: TlsRelay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    url = f"postgresql://postgres@localhost:{relay.port}/postgres?sslmode="
    assert flask("migrate", DATABASE_URL=f"{url}disable").returncode == 0
    done = flask("backup", tmp_path / "backup", DATABASE_URL=f"{url}disable")
    assert done.returncode == 0, done.stderr
    for mode in ("require", "prefer"):  # the connection of the service uses TLS with both
        text = message(flask("backup", tmp_path / "other", DATABASE_URL=f"{url}{mode}"))
        assert "there is no pg_dump for a server of PostgreSQL 18 with TLS" in text
    assert not (tmp_path / "other").exists()
    done = flask("restore", tmp_path / "backup", DATABASE_URL=f"{url}require")
    assert (done.returncode, done.stdout) == (0, "The backup is restored: 0 tasks and 0 idempotency keys.\n")


def test_a_backup_over_tls_uses_a_pg_dump_of_the_system(tmp_path: Path) -> None:
    distributions = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not distributions:
        missing("there is no distribution's PostgreSQL in /usr/lib/postgresql")
    with postgres_with_tls(tmp_path, distributions[0]) as relay:
        url = f"postgresql://postgres@localhost:{relay.port}/postgres?sslmode=require"
        assert flask("migrate", DATABASE_URL=url).returncode == 0
        done = flask("backup", tmp_path / "backup", DATABASE_URL=url)
        assert (done.returncode, ": 0 tasks, " in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("rest", ["sslmode=require", "sslrootcert=system"])
def test_the_error_for_a_psql_without_tls_is_one_line(broken_psql: Path, rest: str) -> None:
    done = subprocess.run(
        [*FLASK, "psql", "-c", "SELECT 1"],
        cwd=ROOT,
        env=environment(DATABASE_URL=f"postgresql://todo:h-u-s-h@127.0.0.1:1/todo?{rest}", PATH=broken_psql),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    bundled = programs.find(None).folder / "psql"
    assert done.stderr.startswith(f"todo_api: DATABASE_URL requires TLS, which {bundled} does not support: install")
