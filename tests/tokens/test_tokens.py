"""Tokens: a valid one makes its user the user of the request, and nothing else does."""

import http.client
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import jwt
import psycopg
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from psycopg.rows import TupleRow

from tests.support.issuer import (
    AUDIENCE,
    ISSUER,
    Issuer,
    Json,
    SigningKey,
    bearer,
    claims,
    encoded,
    running_issuer,
)
from tests.support.problems import assert_problem
from tests.support.processes import START_TIMEOUT
from tests.support.service import Service

FIRST = SigningKey()
ES256, ES384, ES512 = (SigningKey(name, name) for name in ("ES256", "ES384", "ES512"))
RS256, PS256 = SigningKey("RS256", "RS256"), SigningKey("PS256", "PS256")
BOTH = SigningKey("both", "RS256")  # an RSA key without alg
del BOTH.jwk["alg"]
ACCEPTED = [FIRST, ES256, ES384, ES512, RS256, PS256]
# Keys that a key set may list, but that verify no tokens.
ED448, ES256K = SigningKey("Ed448", curve="Ed448"), SigningKey("ES256K", "ES256K")
SHORT = SigningKey("short", "RS256", bits=1024)
SECRET = SigningKey("secret", "HS256")
ENCRYPTS, WRAPS, OF_OTHER_ALG, PRIVATE, NUMBERED = (
    SigningKey(name) for name in ("encrypts", "wraps", "other alg", "private", "7")
)
ENCRYPTS.jwk["use"] = "enc"
WRAPS.jwk["key_ops"] = ["wrapKey"]
OF_OTHER_ALG.jwk["alg"] = "ES256"
PRIVATE.jwk["d"] = encoded(PRIVATE.private.private_bytes_raw())
NUMBERED.jwk["kid"] = 7
UNUSABLE = [ED448, ES256K, SHORT, SECRET, ENCRYPTS, WRAPS, OF_OTHER_ALG, PRIVATE, NUMBERED]
FOREIGN = SigningKey("first")  # the id of a key of the issuer, and another key
MALLORY = SigningKey("mallory")


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    """Run an issuer of tokens."""
    with running_issuer(*ACCEPTED, BOTH, *UNUSABLE) as running:
        running.keys += [{"kty": "EC", "crv": "P-256", "x": "AA", "y": 7}, {"kty": ["RSA"]}, "no key"]
        yield running


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, database_url: str, issuer: Issuer) -> Iterator[Service]:
    """Run a service that trusts the issuer."""
    log = tmp_path_factory.mktemp("tokens") / "log"
    running = Service(log, DATABASE_URL=database_url, WEB_CONCURRENCY=1, **issuer.settings()).wait()
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.log()


def call(service: Service, token: str, path: str = "/api/tasks?limit=1") -> httpx.Response:
    """Make a call with a token. If the service looks for a new key and the machine is busy, try again."""
    deadline = time.monotonic() + START_TIMEOUT
    while (response := service.client.get(path, headers=bearer(token))).status_code == 503:
        assert_problem(response, 503, "keys_unavailable")
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return response


def assert_invalid(response: httpx.Response) -> None:
    """Check that a response is the 401 for an invalid token, which is the same for each reason."""
    problem = assert_problem(response, 401, "invalid_token")
    assert problem["detail"] == "The token is not valid here, or not valid now"
    challenge = f'Bearer error="invalid_token", error_description="{problem["detail"]}"'
    assert response.headers["WWW-Authenticate"] == challenge


class Later(float):
    """A number of seconds. As a claim, it is added to the time at which the token is made."""


def with_claim(name: str, value: object) -> str:
    """Return a token with one changed claim."""
    return FIRST.token(**{"user": "alice", name: time.time() + value if isinstance(value, Later) else value})


# ---- valid tokens


@pytest.mark.parametrize("key", ACCEPTED, ids=lambda key: key.kid)
def test_a_token_of_each_algorithm_is_accepted(tokens: Service, key: SigningKey) -> None:
    for _ in range(2):  # the second time, it is remembered
        response = call(tokens, key.token(f"user of {key.kid}"))
        assert (response.status_code, response.json()) == (200, [])


@pytest.mark.parametrize("algorithm", ["RS256", "PS256"])
def test_an_rsa_key_without_alg_is_for_both_algorithms(tokens: Service, algorithm: str) -> None:
    BOTH.algorithm = algorithm
    assert call(tokens, BOTH.token()).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("aud", [AUDIENCE]),
        ("aud", ["https://other.example", AUDIENCE]),
        ("exp", Later(0.5)),
        ("exp", Later(-10)),  # the clocks may differ by 30 s
        ("nbf", Later(15)),
        ("iat", Later(15)),
        ("nbf", ...),
        ("iat", ...),
        ("sub", "x" * 255),
        ("sub", "auth0|1 Zoë 任务 😀 %'\"\\"),
        ("scope", {"any": ["other", "claim"]}),
    ],
)
def test_claims_are_read_as_the_rfc_says(tokens: Service, name: str, value: object) -> None:
    assert call(tokens, with_claim(name, value)).status_code == 200


@pytest.mark.parametrize("media_type", [..., "JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt", "application/JWT"])
def test_the_types_of_access_tokens_are_accepted(tokens: Service, media_type: object) -> None:
    assert call(tokens, FIRST.sign(claims(), typ=media_type)).status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "Bearer "])
def test_the_scheme_is_case_insensitive(tokens: Service, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {FIRST.token()}"}
    assert tokens.client.get("/api/tasks?limit=1", headers=headers).status_code == 200


def test_a_token_without_kid_needs_exactly_one_key_of_its_algorithm(tokens: Service) -> None:
    assert call(tokens, ES256.sign(claims(), kid=...)).status_code == 200
    assert_invalid(call(tokens, RS256.sign(claims(), kid=...)))


# ---- invalid tokens


def signed_with_the_public_key() -> list[str]:
    """Return HS256 tokens whose secret is the public key, in each format that a verifier may hold it in."""
    formats = [
        RS256.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        RS256.private.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(RS256.jwk).encode(),
    ]
    found = []
    for secret in formats:
        forger = SigningKey("RS256", "HS256")
        forger.private = secret
        found.append(forger.token())
    return found


def swapped(key: SigningKey, algorithm: str) -> str:
    """Return a token of a key that names another algorithm."""
    return key.sign(claims(), alg=algorithm)


def signed_as(key: SigningKey, algorithm: str) -> str:
    """Return a token of a key that is signed with another algorithm of its type."""
    other = SigningKey(key.kid, algorithm)
    other.private = key.private
    return other.token()


def with_segments(*changed: str | None) -> str:
    """Return a valid token in which some segments are replaced."""
    segments = FIRST.token().split(".")
    return ".".join(old if new is None else new for old, new in zip(segments, changed, strict=True))


DEEP = b"[" * 3000 + b"]" * 3000
FORGED = {
    "alg none": f"{encoded({'alg': 'none', 'kid': 'first'})}.{encoded(claims())}.x",
    "alg None": f"{encoded({'alg': 'None', 'kid': 'first'})}.{encoded(claims())}.{encoded(b'x')}",
    "no alg": FIRST.sign(claims(), alg=...),
    "alg is a list": FIRST.sign(claims(), alg=["EdDSA"]),
    "alg is null": FIRST.sign(claims(), alg=None),
    **{f"signed with the public key {n}": token for n, token in enumerate(signed_with_the_public_key())},
    "ES256 for EdDSA": swapped(FIRST, "ES256"),
    "EdDSA for ES256": swapped(ES256, "EdDSA"),
    "HS256 for EdDSA": swapped(FIRST, "HS256"),
    "alg in lower case": swapped(FIRST, "eddsa"),
    "PS256 with a key for RS256": signed_as(RS256, "PS256"),
    "RS256 with a key for PS256": signed_as(PS256, "RS256"),
    "RS512": signed_as(RS256, "RS512"),
    "RS512 with a key without alg": signed_as(BOTH, "RS512"),
    "another key": FOREIGN.token(),
    "jwk": FOREIGN.sign(claims(), jwk=FOREIGN.jwk),
    "jwk without kid": MALLORY.sign(claims(), kid=..., jwk=MALLORY.jwk),
    "jwk with its kid": MALLORY.sign(claims(), jwk=MALLORY.jwk),
    "x5u": FOREIGN.sign(claims(), x5u="https://mallory.example/cert.pem"),
    "x5c": FOREIGN.sign(claims(), x5c=["AAAA"]),
    "unknown kid": MALLORY.token(),
    "numeric kid": FIRST.sign(claims(), kid=7),
    "numeric kid of a key": NUMBERED.sign(claims(), kid=7),
    "kid is null": FIRST.sign(claims(), kid=None),
    "kid is a list": FIRST.sign(claims(), kid=["first"]),
    "empty kid": FIRST.sign(claims(), kid=""),
    "kid is a path": FIRST.sign(claims(), kid="../../../dev/null"),
    "kid is a URL": FIRST.sign(claims(), kid="file:///etc/passwd"),
    "kid is SQL": FIRST.sign(claims(), kid="' UNION SELECT 'secret' --"),
    "kid in upper case": FIRST.sign(claims(), kid="FIRST"),
    "kid with a NUL": FIRST.sign(claims(), kid="first\0"),
    "crit": FIRST.sign(claims(), crit=["exp"], exp=1),
    "unknown crit": FIRST.sign(claims(), crit=["https://example.com/new"], **{"https://example.com/new": True}),
    "empty crit": FIRST.sign(claims(), crit=[]),
    "crit is a string": FIRST.sign(claims(), crit="b64"),
    "b64": FIRST.sign(claims(), b64=False, crit=["b64"]),
    "b64 without crit": FIRST.sign(claims(), b64=False),
    "b64 is true": FIRST.sign(claims(), b64=True, crit=["b64"]),
    **{f"a key that is not used: {key.kid}": key.sign(claims()) for key in UNUSABLE},
    **{f"a key that is not used, without kid: {key.kid}": key.sign(claims(), kid=...) for key in UNUSABLE[:4]},
    **{
        f"typ {media_type}": FIRST.sign(claims(), typ=media_type)
        for media_type in ("logout+jwt", "dpop+jwt", "id_token", "JOSE", "JWE", "", None, 1, ["JWT"], "JWT ", "x/jwt")
    },
    "two segments": FIRST.token().rpartition(".")[0],
    "four segments": f"{FIRST.token()}.{encoded(b'x')}",
    "five segments": ".".join([encoded({"alg": "dir", "enc": "A256GCM"}), "", encoded(b"iv"), "AAAA", "AAAA"]),
    "no segments": "x",
    "only dots": "..",
    "empty signature": with_segments(None, None, ""),
    "other signature": with_segments(None, None, encoded(b"\0" * 64)),
    "short signature": with_segments(None, None, encoded(b"\0")),
    "other claims": with_segments(None, encoded(claims("bob")), None),
    "other header": with_segments(encoded({"alg": "EdDSA", "kid": "first"}), None, None),
    "padding": f"{FIRST.token()}==",
    "standard base64": with_segments(None, None, "++//" * 20),
    "half a byte": with_segments(None, None, "A" * 85),
    "bits left over": FIRST.token()[:-1] + ("B" if FIRST.token()[-1] != "B" else "D"),
    "the header is not JSON": with_segments(encoded(b"{"), None, None),
    "the header is a list": FIRST.sign_segments([], claims()),
    "the header is not UTF-8": FIRST.sign_segments(b'{"alg":"EdDSA","kid":"first","x":"\xff"}', claims()),
    "the header is deep": FIRST.sign_segments(b'{"alg":"EdDSA","kid":"first","x":' + DEEP[1500:-1500] + b"}", b"{"),
    "a deep header": FIRST.sign_segments(DEEP[1000:-1000], claims()),
    "the payload is deep": FIRST.sign(DEEP[1000:-1000]),
    "the payload is not JSON": FIRST.sign(b"alice"),
    "the payload is a list": FIRST.sign([claims()]),
    "the payload is a string": FIRST.sign("alice"),
    "the payload is not UTF-8": FIRST.sign(b'{"sub":"\xff"}'),
    "the payload is empty": FIRST.sign({}),
    "an integer of 5000 digits": FIRST.sign(json.dumps(claims(exp=0)).encode().replace(b" 0", b" " + b"9" * 5000)),
    "nearly 8 KB": "A" * 8000,
    "8 KB in segments": f"{'A' * 2600}.{'A' * 2600}.{'A' * 2600}",
}  # fmt: skip


@pytest.mark.parametrize("token", FORGED.values(), ids=FORGED)
def test_a_forged_token_is_invalid(tokens: Service, token: str) -> None:
    assert_invalid(call(tokens, token))


WRONG_CLAIMS: list[tuple[str, Any]] = [
    ("aud", [..., None, "", [], "https://other.example", ["https://other.example"], f"{AUDIENCE}/", AUDIENCE.upper()]),
    ("aud", [AUDIENCE[:-1], {AUDIENCE: 1}, [AUDIENCE, 7], [[AUDIENCE]], 7, True]),
    ("iss", [..., None, "", f"{ISSUER}/", ISSUER.upper(), ISSUER[:-1], [ISSUER], {"x": ISSUER}, 7]),
    ("exp", [..., None, 0, -1, Later(-31), Later(-1e6), "", "9999999999", True, [9999999999], {}, "never"]),
    *((name, [Later(10_000), None, "1", True, [], {}, "now"]) for name in ("nbf", "iat")),
    *((name, [float("inf"), float("-inf"), float("nan")]) for name in ("exp", "nbf", "iat")),
    ("sub", [..., None, "", "x" * 256, 7, True, ["alice"], {"id": "alice"}]),
    ("sub", ["al\0ice", "al\nice", "al\rice", "\x1b[31m", "\ud83d", "\u202ealice", "\x7f", "a\u2028b"]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_CLAIMS for value in values])
def test_a_claim_that_is_missing_or_wrong_makes_a_token_invalid(tokens: Service, name: str, value: object) -> None:
    assert_invalid(call(tokens, with_claim(name, value)))


def test_a_jku_is_never_fetched(tokens: Service) -> None:
    with running_issuer(FOREIGN, MALLORY) as mallory:
        for key in (FOREIGN, MALLORY):
            for name in ("jku", "x5u"):
                assert_invalid(call(tokens, key.sign(claims(), **{name: mallory.url})))
        assert mallory.fetches == []


def test_one_response_for_all_reasons(tokens: Service) -> None:
    expired = FIRST.token(exp=1)
    responses = [
        call(tokens, token) for token in (expired, FOREIGN.token(), MALLORY.token(), "x", FIRST.token(aud="x"))
    ]
    assert len({response.content for response in responses}) == 1
    differing = {"date", "x-request-id"}
    headers = [{pair for pair in response.headers.items() if pair[0] not in differing} for response in responses]
    assert all(found == headers[0] for found in headers)


def test_a_token_is_invalid_30_seconds_after_its_exp(tokens: Service) -> None:
    token = FIRST.token(exp=int(time.time()) - 26)
    assert call(tokens, token).status_code == 200
    deadline = time.monotonic() + 60
    while (response := call(tokens, token)).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert_invalid(response)
    assert jwt.decode(token, options={"verify_signature": False})["exp"] + 30 <= time.time() + 0.1


# ---- no token, and headers that are not a bearer token


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE"])
@pytest.mark.parametrize("path", ["/api/tasks", "/api/tasks/1", "/api/tasks/1/toggle", "/api", "/api/", "/api/nothing"])
def test_every_url_below_api_needs_a_token(tokens: Service, method: str, path: str) -> None:
    response = tokens.client.request(method, path)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    if method != "HEAD":
        assert_problem(response, 401, "authentication_required")


@pytest.mark.parametrize(
    "header",
    [
        *("", "Bearer", "Basic YTpi", "Digest x", "DPoP x", "x", "Bearer a b", "Bearer a,b", "Bearer a, Bearer b"),
        *("Bearer:x", "Bearerx", 'Bearer "x"', "Bearer !!!!.AAAA.AAAA", "Bearer =", "Bearer a=b", "Béarer x"),
    ],
)
def test_a_header_that_is_no_bearer_token_is_malformed(tokens: Service, header: str) -> None:
    response = tokens.client.get("/api/tasks", headers={b"Authorization": header.encode()})
    assert_problem(response, 400, "malformed_request")


@pytest.mark.parametrize("other", ["Bearer x", "Basic YTpi", ""])
@pytest.mark.parametrize("first", [True, False])
def test_two_headers_are_malformed(tokens: Service, other: str, *, first: bool) -> None:
    given = [bearer(FIRST.token())["Authorization"], other]
    headers = [("Authorization", value) for value in (given if first else reversed(given))]
    assert_problem(tokens.client.get("/api/tasks", headers=headers), 400, "malformed_request")
    same = [("Authorization", given[0])] * 2
    assert_problem(tokens.client.get("/api/tasks", headers=same), 400, "malformed_request")


def test_a_token_anywhere_else_is_no_token(tokens: Service) -> None:
    token = FIRST.token()
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for response in (
        tokens.client.get(f"/api/tasks?access_token={token}"),
        tokens.client.post("/api/tasks", content=f"access_token={token}", headers=form),
        tokens.client.get("/api/tasks", headers={"Cookie": f"token={token}", "Proxy-Authorization": f"Bearer {token}"}),
    ):
        assert_problem(response, 401, "authentication_required")


def test_a_token_of_more_than_8_kb_is_rejected_before_it_is_read(tokens: Service) -> None:
    assert tokens.client.get("/api/tasks", headers=bearer("A" * 9000)).status_code == 431


@pytest.mark.parametrize("path", ["/docs", "/docs/page.js", "/openapi.json", "/healthz", "/readyz", "/", "/nothing"])
def test_other_urls_need_no_token(tokens: Service, path: str) -> None:
    without = tokens.client.get(path)
    assert without.status_code in {200, 302, 404}
    assert "Authorization" not in without.headers.get("Vary", "")
    assert call(tokens, "x", path).status_code == without.status_code


def test_a_request_without_a_token_may_have_a_body_and_keeps_the_connection(tokens: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", tokens.port)
    for body in (b'{"title": "x"}', iter([b'{"title"', b': "x"}'])):
        connection.request("POST", "/api/tasks", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert json.loads(response.read())["type"] == "authentication_required"
        assert response.getheader("Connection") != "close"
        kept = connection.sock
        connection.request("GET", "/api/tasks?limit=1", headers=bearer(FIRST.token()))
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())) == (200, [])
        assert connection.sock is kept
    connection.close()


def test_responses_vary_by_authorization(tokens: Service) -> None:
    responses = [
        call(tokens, FIRST.token()),
        call(tokens, "x"),
        tokens.client.get("/api/tasks"),
        call(tokens, "x", "/api/x"),
    ]
    for response in responses:
        assert response.headers["Vary"] == "Authorization"
    etag = responses[0].headers["ETag"]
    unchanged = tokens.client.get("/api/tasks?limit=1", headers={**bearer(FIRST.token()), "If-None-Match": etag})
    assert (unchanged.status_code, unchanged.headers["Vary"]) == (304, "Authorization")


def test_without_auth_jwks_a_token_is_not_looked_at(client: httpx.Client) -> None:
    response = client.get("/api/tasks?limit=1", headers=bearer("x"))
    assert response.status_code == 200
    assert "Vary" not in response.headers


# ---- users


@pytest.fixture
def users(tokens: Service, db: psycopg.Connection[TupleRow]) -> tuple[httpx.Client, httpx.Client]:
    """Return the clients of two users, without tasks."""
    alice, bob = (
        httpx.Client(base_url=tokens.url, headers=bearer(FIRST.token(user)), timeout=30) for user in ("alice", "bob")
    )
    return alice, bob


def create(client: httpx.Client, title: str, **headers: str) -> Json:
    """Create a task, and return it."""
    response = client.post("/api/tasks", json={"title": title}, headers=headers)
    assert response.status_code == 201, response.text
    task: Json = response.json()
    return task


def test_each_user_sees_only_their_own_tasks(users: tuple[httpx.Client, httpx.Client]) -> None:
    for client, name in zip(users, ("alice", "bob"), strict=True):
        assert create(client, name)["user_id"] == name
    for client, name in zip(users, ("alice", "bob"), strict=True):
        assert [task["title"] for task in client.get("/api/tasks").json()] == [name]


@pytest.mark.parametrize("if_match", [None, "*", '"1"', '"2"', 'W/"1"', "invalid"])
def test_another_users_task_gets_the_404_of_a_missing_one(
    users: tuple[httpx.Client, httpx.Client], if_match: str | None
) -> None:
    alice, bob = users
    path = f"/api/tasks/{(task := create(alice, 'of alice'))['id']}"
    headers = {} if if_match is None else {"If-Match": if_match}
    for method, below in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/toggle")):
        body = {"title": "of bob"} if method == "PATCH" else None
        found, missing = (
            bob.request(method, f"{url}{below}", headers=headers, json=body) for url in (path, "/api/tasks/999999999")
        )
        problem = assert_problem(found, 404, "not_found")
        assert problem | {"instance": ""} == missing.json() | {"instance": ""}
        assert "ETag" not in found.headers
    assert alice.get(path).json() == task


def test_the_same_idempotency_key_of_two_users_makes_two_tasks(users: tuple[httpx.Client, httpx.Client]) -> None:
    made = [create(client, "Buy milk", **{"Idempotency-Key": "same"}) for client in (*users, *users)]
    assert [task["user_id"] for task in made] == ["alice", "bob", "alice", "bob"]
    assert (made[0], made[1]) == (made[2], made[3])
    assert made[0]["id"] != made[1]["id"]


def test_a_service_with_tokens_and_one_without_share_no_tasks(
    users: tuple[httpx.Client, httpx.Client], client: httpx.Client
) -> None:
    alice, bob = users
    made = [create(sender, "Buy milk") for sender in (client, alice)]
    assert client.get("/api/tasks").json() == made[:1]
    assert alice.get("/api/tasks").json() == made[1:]
    assert bob.get("/api/tasks").json() == []


# ---- the log


def test_the_log_has_no_part_of_a_token(tokens: Service, issuer: Issuer) -> None:
    sent = [
        FIRST.token("named-in-a-token"),
        FOREIGN.token(),
        MALLORY.token(),
        FIRST.token(exp=1),
        *list(FORGED.values())[:40],
    ]
    for token in sent:
        call(tokens, token)
        tokens.client.get(f"/api/tasks?access_token={token}")
        tokens.client.get("/api/tasks", headers={"Authorization": f"Basic {token}"})
        tokens.client.get("/api/tasks", headers=[*bearer(token).items()] * 2)
    with tokens.client.stream(
        "GET", "/api/tasks", headers={"Authorization": f"Bearer {'secretpart' * 900}"}
    ) as response:
        assert response.status_code == 431
    log = tokens.log()
    for token in sent:
        for segment in token.split("."):
            assert len(segment) < 12 or segment[:12] not in log
    assert "secretpart" not in log
    assert ISSUER not in log
