"""Better Auth, a real issuer of tokens, as the READMEs set it up: sign up, fetch a token, use it, rotate its keys."""

import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from tests.docs.test_readme import BETTER_AUTH, READMES, SIGN_UP, TOKENS
from tests.support.fixtures import Start
from tests.support.issuer import Json, bearer
from tests.support.optional_tools import NPM, missing, program
from tests.support.problems import assert_problem
from tests.support.processes import free_port, wait_until
from tests.support.service import Service

PASSWORD = "correct horse battery"
# On a signal, the keys expire, as they do with the option rotationInterval. Better Auth still publishes them.
ROTATE = """
process.on("SIGUSR2", async () => {
  const { adapter } = await auth.$context;
  for (const { id } of await adapter.findMany({ model: "jwks" }))
    await adapter.update({ model: "jwks", where: [{ field: "id", value: id }], update: { expiresAt: new Date() } });
});
"""


class BetterAuth:
    """A running Better Auth, and the service that trusts it."""

    def __init__(self, folder: Path, script: str) -> None:
        """Run the script of the README at a free port."""
        self.port = free_port()
        (folder / "node_modules").symlink_to(NPM / "node_modules")
        (folder / "issuer.mjs").write_text(self.with_port(script).replace("listen(3000", f"listen({self.port}"))
        self.log = folder / "log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [program("node"), "issuer.mjs"], cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self.url = f"http://localhost:{self.port}"

    def with_port(self, text: str) -> str:
        """Return a text of the README with the port of this issuer: another program may use port 3000."""
        return text.replace("localhost:3000", f"localhost:{self.port}")

    def settings(self) -> dict[str, Any]:
        """Return the settings of the service in the README."""
        return dict(re.findall(r"(AUTH_\w+)=(\S+)", self.with_port(TOKENS)))

    def answers(self) -> bool:
        """Return whether the key set can be fetched."""
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.client().get("/api/auth/jwks").status_code == 200
        except httpx.TransportError:
            return False

    def client(self) -> httpx.Client:
        """Return an HTTP client with cookies of its own."""
        return httpx.Client(base_url=self.url, timeout=60)

    def sign_up(self, name: str) -> "User":
        """Sign a new user up."""
        client = self.client()
        body = {"name": name, "email": f"{name}@example.com", "password": PASSWORD}
        response = client.post("/api/auth/sign-up/email", json=body)
        assert response.status_code == 200, response.text
        return User(client, response.json()["user"]["id"])


class User:
    """A user who has signed in."""

    def __init__(self, client: httpx.Client, user_id: str) -> None:
        """Keep the client, which has the cookie of the session."""
        self.client, self.user_id = client, user_id

    def token(self) -> str:
        """Fetch a token."""
        response = self.client.get("/api/auth/token")
        assert response.status_code == 200, response.text
        token: str = response.json()["token"]
        return token


Run = Callable[..., BetterAuth]


@pytest.fixture
def better_auth(tmp_path: Path) -> Iterator[Run]:
    """Return a function that runs Better Auth with a script."""
    if not (NPM / "node_modules" / "better-auth").exists():
        missing("the npm packages are not installed: npm ci --prefix tests/npm")

    @contextmanager
    def running(script: str) -> Iterator[BetterAuth]:
        folder = tmp_path / "better-auth"
        folder.mkdir()
        issuer = BetterAuth(folder, script)
        try:
            wait_until(issuer.answers)
            yield issuer
        finally:
            issuer.process.kill()
            issuer.process.wait()

    with ExitStack() as stack:
        yield lambda script=BETTER_AUTH: stack.enter_context(running(script))


@pytest.fixture
def serve(start: Start, database_url: str) -> Callable[[BetterAuth], Service]:
    """Return a function that starts the service that trusts an issuer."""
    return lambda issuer: start(DATABASE_URL=database_url, **issuer.settings()).wait()


Serve = Callable[[BetterAuth], Service]


def key_id(token: str) -> str:
    """Return the id of the key that signed a token."""
    kid: str = jwt.get_unverified_header(token)["kid"]
    return kid


def create(service: Service, token: str, title: str) -> Json:
    """Create a task with a token."""
    response = service.client.post("/api/tasks", json={"title": title}, headers=bearer(token))
    assert response.status_code == 201, response.text
    task: Json = response.json()
    return task


def test_the_package_has_the_tested_version() -> None:
    package = json.loads((NPM / "package.json").read_text(encoding="utf-8"))
    assert f"`npm install better-auth@{package['dependencies']['better-auth']}`" in READMES[".deploy/README.md"]


def test_the_commands_of_the_readme_create_a_task(better_auth: Run, serve: Serve, tmp_path: Path) -> None:
    program("curl")
    issuer = better_auth()
    service = serve(issuer)
    commands = issuer.with_port(SIGN_UP).replace("127.0.0.1:8000", f"127.0.0.1:{service.port}")
    done = subprocess.run(["sh", "-e", "-c", commands], cwd=tmp_path, capture_output=True, text=True, check=True)
    task = json.loads(done.stdout)
    assert task["title"] == "Buy milk"
    assert len(task["user_id"]) == 32


def test_two_users_have_their_own_tasks(better_auth: Run, serve: Serve) -> None:
    issuer = better_auth()
    service = serve(issuer)
    users = [issuer.sign_up(name) for name in ("alice", "bob")]
    for user in users:
        assert create(service, user.token(), user.user_id)["user_id"] == user.user_id
    for user in users:
        tasks = service.client.get("/api/tasks", headers=bearer(user.token())).json()
        assert [task["title"] for task in tasks] == [user.user_id]


def test_a_token_of_a_rotated_key_is_accepted_at_once(better_auth: Run, serve: Serve) -> None:
    issuer = better_auth(BETTER_AUTH + ROTATE)
    service = serve(issuer)
    alice = issuer.sign_up("alice")
    old = alice.token()
    create(service, old, "with the old key")
    issuer.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: key_id(alice.token()) != key_id(old))
    create(service, alice.token(), "with the new key")
    create(service, old, "with the old key, which is still published")


def test_a_user_who_has_signed_out_gets_no_more_tokens(better_auth: Run, serve: Serve) -> None:
    issuer = better_auth()
    service = serve(issuer)
    alice = issuer.sign_up("alice")
    token = alice.token()
    assert alice.client.post("/api/auth/sign-out", json={}, headers={"Origin": issuer.url}).status_code == 200
    assert alice.client.get("/api/auth/token").status_code == 401
    create(service, token, "the token counts until it expires")


def test_what_else_better_auth_signs_is_no_token(better_auth: Run, serve: Serve) -> None:
    """Check tokens for another audience, and the cookie of the session, which is not signed with the key."""
    issuer = better_auth(BETTER_AUTH.replace("https://todo.example.com", "https://other.example.com"))
    service = serve(issuer)
    alice = issuer.sign_up("alice")
    for token in (alice.token(), alice.client.cookies["better-auth.session_token"].partition("%")[0]):
        response = service.client.get("/api/tasks", headers=bearer(token))
        assert_problem(response, 401, "invalid_token")
