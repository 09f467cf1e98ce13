"""Key sets: where the keys of tokens come from, and what happens if the issuer is away, slow, wrong or hostile."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from tests.support.environment import ROOT, environment
from tests.support.fixtures import Start
from tests.support.issuer import (
    AUDIENCE,
    ISSUER,
    Issuer,
    SigningKey,
    bearer,
    claims,
    encoded,
    running_issuer,
    send,
)
from tests.support.problems import assert_problem
from tests.support.processes import free_port, has_ended, wait_until
from tests.support.processes import send as send_signal
from tests.support.service import workers
from todo_api import create_app, tokens
from todo_api.config import Settings, StartError
from todo_api.tokens import fetching, key_set, keys, verifier

FIRST, SECOND, UNKNOWN = SigningKey("first"), SigningKey("second"), SigningKey("unknown")
PATH = "/api/tasks?limit=1"
NOWHERE = "/api/nothing"  # a 404 if the token is accepted; it needs no database


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    """Run an issuer with one key."""
    with running_issuer(FIRST) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_fetches_after_the_test() -> Iterator[None]:
    """Let the threads of the test's applications sleep after it. They have no end, and would log that fetches fail."""
    yield
    for found in list(vars(key_set)["_key_sets"]):
        pytest.MonkeyPatch().setattr(found, "_load", threading.Event().wait)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the intervals between fetches 0.2 s, if there are keys."""
    monkeypatch.setattr(key_set, "_REFRESH", 0.2)
    monkeypatch.setattr(key_set, "_RETRY", 0.2)
    monkeypatch.setattr(key_set, "_PAUSE", 0.2)


@pytest.fixture
def settings(issuer: Issuer) -> Settings:
    """Return the settings of an application that trusts the issuer. It has no database."""
    names = {name.lower(): value for name, value in issuer.settings().items()}
    return Settings(database_url="postgresql://todo@127.0.0.1:1/todo", **names)


def client_of(settings: Settings) -> FlaskClient:
    """Create an application, and return its client."""
    return create_app(settings).test_client()


@pytest.fixture
def client(settings: Settings) -> FlaskClient:
    """Return the client of an application that trusts the issuer, and has its keys."""
    client = client_of(settings)
    wait_until(lambda: accepts(client, FIRST.token("nobody")))
    return client


def call(client: FlaskClient, token: str) -> TestResponse:
    """Make a call with a token."""
    return client.get(NOWHERE, headers=bearer(token))


def accepts(client: FlaskClient, token: str) -> bool:
    """Return whether a token is accepted."""
    return kind(call(client, token)) == "not_found"


def kind(response: TestResponse) -> str:
    """Return the type of the problem."""
    assert response.json
    found: str = response.json["type"]
    return found


def assert_unavailable(response: TestResponse) -> None:
    """Check that a response is the 503 of a service without keys."""
    assert (response.status_code, kind(response)) == (503, "keys_unavailable")
    assert int(response.headers["Retry-After"]) > 0


def log_lines(caplog: pytest.LogCaptureFixture, source: str) -> list[str]:
    """Return the log lines about a key set. The threads of other tests log, too."""
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("todo_api.tokens")]
    return [line for line in lines if line.endswith(f"{source})")]


# ---- the issuer's faults


def drip(handler: BaseHTTPRequestHandler, head: bytes) -> None:
    """Send a byte every tenth of a second, until the client has had enough."""
    handler.wfile.write(head)
    with suppress(OSError):
        for _ in range(600):
            handler.wfile.write(b" ")
            time.sleep(0.1)
    handler.close_connection = True


def redirect(handler: BaseHTTPRequestHandler) -> None:
    """Send a redirect to the key set itself, at another path."""
    if handler.path == "/jwks":
        send(handler, b"", 302, {"Location": "/elsewhere"})
    else:
        send(handler, json.dumps({"keys": [FIRST.jwk, UNKNOWN.jwk]}).encode())


TEXT = {"Content-Type": "text/html"}
HEAD = b"HTTP/1.0 200 OK\r\n"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
DEEP = b'{"keys":' + b"[" * 30_000 + b"]" * 30_000 + b"}"
FAULTS: dict[str, Callable[[BaseHTTPRequestHandler], Any]] = {
    "slow drip": lambda handler: drip(handler, HEAD + b"\r\n"),
    "slow drip in the head": lambda handler: drip(handler, HEAD + b"X: "),
    "slow drip of chunks": lambda handler: drip(handler, CHUNKS + b"1;"),
    "no response": lambda _handler: time.sleep(3),
    "10 MB": lambda handler: send(handler, b" " * 10_000_000),
    "10 MB without a length": lambda handler: handler.wfile.write(HEAD + b"\r\n" + b" " * 10_000_000),
    "10 MB of headers": lambda handler: handler.wfile.write(HEAD + b"X: y\r\n" * 2_000_000),
    "64 KiB and one byte": lambda handler: send(handler, b'{"keys":[]}'.ljust(64 * 1024 + 1)),
    "a head and no body": lambda handler: send(handler, b"", headers={"Content-Length": "100"}),
    "half of it": lambda handler: send(handler, b'{"keys": [', headers={"Content-Length": "100"}),
    "HTML": lambda handler: send(handler, b"<!doctype html><title>Sign in</title>", headers=TEXT),
    "redirect": redirect,
    "404": lambda handler: send(handler, b'{"keys":[]}', 404),
    "500": lambda handler: send(handler, json.dumps({"keys": []}).encode(), 500),
    "not HTTP": lambda handler: handler.wfile.write(b"\x00\xff" * 100 + b"\n"),
    "empty body": lambda handler: send(handler, b""),
    "not UTF-8": lambda handler: send(handler, b'{"keys":["\xff"]}'),
    "deep nesting": lambda handler: send(handler, DEEP),
    "a list": lambda handler: send(handler, b"[]"),
    "no keys member": lambda handler: send(handler, json.dumps(FIRST.jwk).encode()),
    "keys is an object": lambda handler: send(handler, b'{"keys":{}}'),
    "compressed": lambda handler: send(handler, b"\x1f\x8b\x08\x00", headers={"Content-Encoding": "gzip"}),
}  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_key_set_changes_nothing_and_is_logged_once(
    fault: str, client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fetching, "_TIMEOUT", 1.0)
    valid = FIRST.token()
    assert accepts(client, valid)
    issuer.respond = FAULTS[fault]
    seen = len(issuer.fetches)
    wait_until(lambda: len(issuer.fetches) > seen + 1)  # so the one before has failed
    for _ in range(3):
        assert accepts(client, valid)
        assert accepts(client, FIRST.token("bob"))
        assert kind(call(client, UNKNOWN.token())) in {"invalid_token", "keys_unavailable"}
    assert "/elsewhere" not in issuer.fetches
    issuer.respond, issuer.keys = issuer.respond_with_keys, [FIRST.jwk, SECOND.jwk]
    wait_until(lambda: accepts(client, SECOND.token()) and len(log_lines(caplog, issuer.url)) > 1)
    [failed, mended] = log_lines(caplog, issuer.url)
    assert failed.startswith("the keys of tokens cannot be fetched: ")
    assert "available again" in mended
    assert max(len(failed), len(mended)) < 300
    assert failed.isascii()


@pytest.mark.parametrize("fault", ["slow drip", "no response", "HTML", "10 MB"])
def test_without_keys_only_calls_with_a_token_fail(fault: str, settings: Settings, issuer: Issuer) -> None:
    client = client_of(settings)
    issuer.respond = FAULTS[fault]
    for _ in range(3):
        assert_unavailable(call(client, FIRST.token()))
    assert kind(client.get(NOWHERE)) == "authentication_required"
    assert kind(client.get(NOWHERE, headers={"Authorization": "Basic x"})) == "malformed_request"
    for path in ("/docs", "/openapi.json", "/healthz"):
        assert client.get(path).status_code == 200


def test_an_issuer_that_is_away_at_the_start_is_found_later(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    client = client_of(replace(settings, auth_jwks=f"http://127.0.0.1:{(port := free_port())}/jwks"))
    for _ in range(3):
        assert_unavailable(call(client, FIRST.token()))
    with running_issuer(FIRST, port=port):
        wait_until(lambda: accepts(client, FIRST.token()) and len(log_lines(caplog, f":{port}/jwks")) > 1)
    [failed, mended] = log_lines(caplog, f":{port}/jwks")
    assert "Connection refused" in failed
    assert "available again" in mended


@pytest.mark.usefixtures("quick")
def test_keys_count_for_a_limited_time_while_the_issuer_is_away(
    client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = FIRST.token()
    assert accepts(client, token)
    monkeypatch.setattr(key_set, "_KEPT", 2)
    issuer.respond = FAULTS["500"]
    wait_until(lambda: not accepts(client, token))
    assert_unavailable(call(client, token))
    issuer.respond = issuer.respond_with_keys
    wait_until(lambda: accepts(client, token))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("listed", [[], [SigningKey("other", "ES256K").jwk], [{}]])
def test_an_issuer_can_withdraw_all_of_its_keys(client: FlaskClient, issuer: Issuer, listed: list[Any]) -> None:
    token = FIRST.token()
    assert accepts(client, token)
    issuer.keys = listed
    wait_until(lambda: not accepts(client, token))
    assert_unavailable(call(client, token))


# ---- keys that change


@pytest.mark.usefixtures("quick")
def test_a_remembered_token_of_a_withdrawn_key_does_not_count(client: FlaskClient, issuer: Issuer) -> None:
    token = FIRST.token()
    issuer.keys = [FIRST.jwk, SECOND.jwk]
    assert accepts(client, token)
    issuer.keys = [SECOND.jwk]
    wait_until(lambda: not accepts(client, token))
    assert kind(call(client, token)) == "invalid_token"
    assert accepts(client, SECOND.token())


@pytest.mark.usefixtures("quick")
def test_a_remembered_token_of_a_replaced_key_does_not_count(client: FlaskClient, issuer: Issuer) -> None:
    token = FIRST.token()
    assert accepts(client, token)
    issuer.keys = [SECOND.jwk | {"kid": "first"}]
    wait_until(lambda: not accepts(client, token))
    assert kind(call(client, token)) == "invalid_token"


def test_a_new_key_counts_at_once(client: FlaskClient, issuer: Issuer) -> None:
    issuer.keys = [FIRST.jwk, SECOND.jwk]  # a moment after the first fetch

    def first_answer(_number: int) -> str:
        while (answer := kind(call(client, SECOND.token()))) == "keys_unavailable":  # the machine is busy
            time.sleep(0.1)
        return answer

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(first_answer, range(8))) == ["not_found"] * 8
    assert accepts(client, FIRST.token())
    assert len(issuer.fetches) == 2


def test_unknown_keys_are_looked_for_at_most_once_in_ten_seconds(client: FlaskClient, issuer: Issuer) -> None:
    valid = FIRST.token()
    assert accepts(client, valid)
    began = time.monotonic()
    for number in range(100):
        answer = kind(call(client, UNKNOWN.sign(claims(), kid=f"{number}")))
        assert answer == "invalid_token" or (answer == "keys_unavailable" and number == 0)
        assert accepts(client, valid)
    assert len(issuer.fetches) <= 2 + (time.monotonic() - began) / 10


def test_requests_wait_for_half_a_second_together(
    client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_TIMEOUT", 60)
    ended = threading.Event()
    issuer.respond = lambda _handler: ended.wait()
    began = time.monotonic()
    kinds = [kind(call(client, UNKNOWN.token())) for _ in range(40)]
    assert time.monotonic() - began < 10  # one after the other, each for half a second, would be 20
    ended.set()
    assert kinds == ["keys_unavailable"] * 40
    assert len(issuer.fetches) == 2


def test_valid_tokens_are_answered_during_a_flood_of_unknown_keys(
    start: Start, database_url: str, issuer: Issuer
) -> None:
    service = start(DATABASE_URL=database_url, WEB_THREADS=4, **issuer.settings()).wait()
    valid = FIRST.token()
    wait_until(lambda: service.client.get(PATH, headers=bearer(valid)).status_code == 200)
    began = time.monotonic()
    issuer.respond = FAULTS["slow drip"]
    flooding = threading.Event()
    kinds = set()

    def flood() -> None:
        with httpx.Client(base_url=service.url, timeout=60) as client:
            while not flooding.is_set():
                response = client.get(PATH, headers=bearer(UNKNOWN.sign(claims(), kid=os.urandom(4).hex())))
                kinds.add(response.json()["type"])

    threads = [threading.Thread(target=flood) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for number in range(60):
            token = valid if number % 2 else FIRST.token(f"user {number}")
            assert service.client.get(PATH, headers=bearer(token)).status_code == 200
            time.sleep(0.02)
        wait_until(lambda: "the keys of tokens cannot be fetched" in service.log())
    finally:
        flooding.set()
        for thread in threads:
            thread.join()
    assert kinds <= {"invalid_token", "keys_unavailable"}
    assert len(issuer.fetches) <= 2 + (time.monotonic() - began) / 10
    assert [seconds for seconds in service.took(200) if seconds > 1] == []
    assert service.log().count("the keys of tokens cannot be fetched") == 1


# ---- remembered tokens


@pytest.mark.usefixtures("quick")
def test_a_token_is_verified_once_as_long_as_the_keys_stay(
    client: FlaskClient, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = FIRST.token()
    assert accepts(client, token)
    seen = len(issuer.fetches)
    wait_until(lambda: len(issuer.fetches) > seen + 1)
    monkeypatch.setattr(jwt, "decode", lambda *_args, **_kwargs: pytest.fail("the token is verified again"))
    assert accepts(client, token)


def test_a_remembered_token_ends_with_its_exp(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "_LEEWAY", 0)
    token = FIRST.token(exp=int(time.time()) + 4)
    assert accepts(client, token)
    wait_until(lambda: not accepts(client, token))
    assert kind(call(client, token)) == "invalid_token"
    assert time.time() >= jwt.decode(token, options={"verify_signature": False})["exp"]


def test_only_so_many_tokens_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_REMEMBERED", 3)
    remembered = keys.Keys([])
    for number in range(10):
        remembered.remember(bytes([number]), "alice", 1)
        remembered.remember(bytes([number]), "alice", 2)
    found = [number for number in range(10) if remembered.verified(bytes([number]))]
    assert found == [7, 8, 9]


# ---- files


def write(file: Path, *listed: object) -> str:
    """Write a key set to a file, at once, and return its path."""
    new = file.with_name("new")
    new.write_text(json.dumps({"keys": listed}))
    new.rename(file)
    return str(file)


def test_a_key_set_can_be_a_file(tmp_path: Path, settings: Settings) -> None:
    secret = SigningKey("secret", "HS256", bits=256)
    client = client_of(replace(settings, auth_jwks=write(tmp_path / "keys.json", FIRST.jwk, secret.jwk)))
    wait_until(lambda: accepts(client, FIRST.token()))
    assert accepts(client, secret.token())
    assert kind(call(client, SECOND.token())) == "invalid_token"
    secret.algorithm = "HS512"
    assert kind(call(client, secret.token())) == "invalid_token"


@pytest.mark.usefixtures("quick")
def test_a_file_is_read_again(tmp_path: Path, settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    file, token = tmp_path / "keys.json", FIRST.token()
    client = client_of(replace(settings, auth_jwks=write(file, FIRST.jwk)))
    assert accepts(client, token)
    write(file, SECOND.jwk, {"kty": "oct", "k": "c2hvcnQ"})  # one of them cannot be used
    wait_until(lambda: "key 2 cannot be used" in caplog.text)
    assert accepts(client, token)
    write(file, SECOND.jwk)
    wait_until(lambda: accepts(client, SECOND.token()))
    assert kind(call(client, token)) == "invalid_token"


PRIVATE = FIRST.jwk | {"d": encoded(FIRST.private.private_bytes_raw())}
UNUSABLE_FILES = {
    "it cannot be read: No such file or directory": None,
    "it is not JSON": b"-----BEGIN PUBLIC KEY-----",
    "it is not a key set": json.dumps(FIRST.jwk).encode(),
    "the file has no keys": b'{"keys":[]}',
    "larger than 65536 bytes": b" " * 70_000,
    "key 1 cannot be used: it is not a JSON object": b'{"keys":["x"]}',
    "key 2 cannot be used: its kty": json.dumps({"keys": [FIRST.jwk, SigningKey("x", "ES256K").jwk]}).encode(),
    "an RSA key needs 2048 bits": json.dumps({"keys": [SigningKey("x", "RS256", bits=1024).jwk]}).encode(),
    "a secret key needs 256 bits": json.dumps({"keys": [SigningKey("x", "HS256", bits=128).jwk]}).encode(),
    "its numbers are not those of a key": json.dumps({"keys": [FIRST.jwk | {"x": "AA"}]}).encode(),
    "it is a private key": json.dumps({"keys": [PRIVATE]}).encode(),
    "its use or its key_ops": json.dumps({"keys": [FIRST.jwk | {"use": "enc"}]}).encode(),
    "its kid is not a string": json.dumps({"keys": [FIRST.jwk | {"kid": 7}]}).encode(),
}


@pytest.mark.parametrize("reason", UNUSABLE_FILES)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, reason: str) -> None:
    file, content = tmp_path / "keys.json", UNUSABLE_FILES[reason]
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(StartError, match=f"AUTH_JWKS: {file}: .*{re.escape(reason)}") as raised:
        tokens.check_key_file(Settings(auth_jwks=str(file)))
    assert PRIVATE["d"] not in str(raised.value)


def test_a_path_that_is_not_a_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    for path in (tmp_path, pipe, Path("/dev/zero")):
        with pytest.raises(StartError, match=f"AUTH_JWKS: {path}: it is not a file"):
            tokens.check_key_file(Settings(auth_jwks=str(path)))


def test_a_file_that_cannot_be_used_stops_the_start_with_one_line(tmp_path: Path) -> None:
    variables = environment(
        AUTH_JWKS=tmp_path / "keys", AUTH_ISSUER=ISSUER, AUTH_AUDIENCE=AUDIENCE, DATA_DIR=tmp_path / "data"
    )
    command = [sys.executable, "wsgi.py"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stderr == f"todo_api: AUTH_JWKS: {tmp_path / 'keys'}: it cannot be read: No such file or directory\n"
    assert not (tmp_path / "data").exists()


def test_a_file_that_gets_invalid_does_not_stop_a_service_whose_worker_is_replaced(
    start: Start, database_url: str, tmp_path: Path
) -> None:
    source = write(file := tmp_path / "keys.json", FIRST.jwk)
    settings = {"AUTH_JWKS": source, "AUTH_ISSUER": ISSUER, "AUTH_AUDIENCE": AUDIENCE}
    service = start(DATABASE_URL=database_url, **settings).wait()
    token = bearer(FIRST.token())
    wait_until(lambda: service.client.get(PATH, headers=token).status_code == 200)
    file.write_text("")
    [worker] = workers(service)
    send_signal(signal.SIGKILL, worker)
    wait_until(lambda: has_ended(worker) and bool(workers(service)) and service.answers())
    assert_problem(service.client.get(PATH, headers=token), 503, "keys_unavailable")
    assert service.client.get("/docs").status_code == 200
    write(file, FIRST.jwk)
    wait_until(lambda: service.client.get(PATH, headers=token).status_code == 200)
    assert service.stop() == 0
    assert "it is not JSON" in service.log()


# ---- processes

FORKS = """
import json, os, sys, time
from todo_api import create_app
from tests.support.issuer import bearer
client = create_app().test_client()
def status():
    while (answer := client.get("/api/nothing", headers=bearer(sys.argv[1])).status_code) == 503:
        time.sleep(0.1)
    return answer
seen = [status()] if sys.argv[2] == "after a request" else []
child = os.fork()
seen.append(status())
if child:
    seen.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(seen)
else:
    os._exit(seen[-1] - 404)
"""


@pytest.mark.parametrize("moment", ["before a request", "after a request"])
def test_a_server_may_fork_late(issuer: Issuer, database_url: str, moment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS, FIRST.token(), moment],
        cwd=ROOT,
        env=environment(DATABASE_URL=database_url, **issuer.settings()),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout) == [404] * (2 if moment == "after a request" else 1) + [0]
    assert len(issuer.fetches) == 2


LIBRARIES = """
import sys
from todo_api import create_app
assert create_app().test_client().get("/docs").status_code == 200
import todo_api.server.gunicorn_conf
print(sorted({"jwt", "cryptography"} & sys.modules.keys()))
"""


@pytest.mark.parametrize("with_tokens", [False, True])
def test_without_auth_jwks_the_libraries_for_tokens_are_not_imported(
    issuer: Issuer, database_url: str, *, with_tokens: bool
) -> None:
    settings = issuer.settings() if with_tokens else {}
    done = subprocess.run(
        [sys.executable, "-c", LIBRARIES],
        cwd=ROOT,
        env=environment(DATABASE_URL=database_url, **settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == ("['cryptography', 'jwt']" if with_tokens else "[]")
    assert issuer.fetches == []


def test_a_route_that_is_added_later_needs_a_token(settings: Settings) -> None:
    app = create_app(settings)
    app.add_url_rule("/api/new", "new", lambda: "new")
    client = app.test_client()
    assert kind(client.get("/api/new")) == "authentication_required"
    assert client.get("/api/new", headers=bearer(FIRST.token())).text == "new"
    assert client.options("/api/new").status_code == 200
