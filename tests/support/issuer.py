"""An issuer of tokens: real keys, and an HTTP server with their key set, which can fail in many ways."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from jwt.algorithms import Algorithm, get_default_algorithms

ISSUER = "https://auth.example"
AUDIENCE = "https://todo.example"
Json = dict[str, Any]
_CURVES = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1(), "ES256K": ec.SECP256K1()}


@cache
def _rsa_key(bits: int) -> rsa.RSAPrivateKey:
    """Return a key, always the same one: a new one takes a second on a busy machine."""
    return rsa.generate_private_key(65537, bits)


def encoded(value: bytes | object) -> str:
    """Return bytes, or a value as JSON, in base64url without padding."""
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def claims(user: object = "alice", **changed: object) -> Json:
    """Return the claims of a valid token. ``changed`` replaces some of them, and removes those that are ``...``."""
    now = int(time.time())
    valid = {"iss": ISSUER, "aud": AUDIENCE, "sub": user, "iat": now, "nbf": now, "exp": now + 86_400}
    return {name: value for name, value in (valid | changed).items() if value is not ...}


class SigningKey:
    """A key of an issuer, which signs tokens."""

    def __init__(
        self, kid: str = "first", algorithm: str = "EdDSA", *, bits: int = 2048, curve: str = "Ed25519"
    ) -> None:
        """Create a key for an algorithm. ``bits`` is for RSA keys, and ``curve`` for EdDSA."""
        self.kid, self.algorithm = kid, algorithm
        self.private: Any = self._new(bits, curve)
        public = self.private.public_key() if hasattr(self.private, "public_key") else self.private
        self.jwk: Json = {**self.signer.to_jwk(public, as_dict=True), "kid": kid, "alg": algorithm, "use": "sig"}
        self.jwk.pop("key_ops", None)

    def _new(self, bits: int, curve: str) -> Any:
        if self.algorithm == "EdDSA":
            module = ed25519.Ed25519PrivateKey if curve == "Ed25519" else ed448.Ed448PrivateKey
            return module.generate()
        if self.algorithm in _CURVES:
            return ec.generate_private_key(_CURVES[self.algorithm])
        return b"s" * (bits // 8) if self.algorithm == "HS256" else _rsa_key(bits)

    @property
    def signer(self) -> Algorithm:
        """Return what signs with the algorithm."""
        return get_default_algorithms()[self.algorithm]

    def sign(self, payload: object, **header: object) -> str:
        """Return a token with a payload, which is JSON or bytes. ``header`` changes the header as in ``claims``."""
        whole = {"alg": self.algorithm, "kid": self.kid, "typ": "JWT"} | header
        return self.sign_segments({name: value for name, value in whole.items() if value is not ...}, payload)

    def sign_segments(self, header: object, payload: object) -> str:
        """Return a token with any header and any payload, and a valid signature."""
        signed = f"{encoded(header)}.{encoded(payload)}"
        return f"{signed}.{encoded(self.signer.sign(signed.encode(), self.private))}"

    def token(self, user: object = "alice", **changed: object) -> str:
        """Return a valid token of a user, or one with other claims."""
        return self.sign(claims(user, **changed))


class Issuer:
    """An HTTP server with a key set. Tests change ``keys`` and ``respond`` while it runs."""

    def __init__(self, *keys: SigningKey, port: int = 0) -> None:
        """Serve the public parts of keys, at a port; 0 is any free one."""
        self.keys: list[Any] = [key.jwk for key in keys]
        self.fetches: list[str] = []  # the paths of the requests
        self.respond: Callable[[BaseHTTPRequestHandler], object] = self.respond_with_keys
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.fetches.append(self.path)
                issuer.respond(self)

            def log_message(self, *_args: object) -> None:
                pass

        # A handler that still sends must not delay the end of the test.
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks"

    def respond_with_keys(self, handler: BaseHTTPRequestHandler) -> None:
        """Send the key set."""
        send(handler, json.dumps({"keys": self.keys}).encode())

    def settings(self) -> Json:
        """Return the settings of a service that trusts this issuer."""
        return {"AUTH_JWKS": self.url, "AUTH_ISSUER": ISSUER, "AUTH_AUDIENCE": AUDIENCE}


def send(
    handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, headers: dict[str, str] | None = None
) -> None:
    """Send a response."""
    handler.send_response(status)
    given = {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
    for name, value in given.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def running_issuer(*keys: SigningKey, port: int = 0) -> Iterator[Issuer]:
    """Run an issuer with these keys."""
    issuer = Issuer(*keys, port=port)
    with issuer.server:
        threading.Thread(target=issuer.server.serve_forever, daemon=True).start()
        yield issuer
        issuer.server.shutdown()


def bearer(token: str) -> dict[str, str]:
    """Return the header of a request with a token."""
    return {"Authorization": f"Bearer {token}"}
