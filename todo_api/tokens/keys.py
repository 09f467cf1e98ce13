"""Reads key sets (RFC 7517): the keys that may verify tokens, and the algorithms that each key is for."""

import json
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt

from todo_api.config import StartError
from todo_api.tokens.errors import KeySetError
from todo_api.tokens.fetching import MAX_BYTES, fetch

# The type and the curve of a key -> the algorithms that it may verify. "EdDSA" alone would also mean Ed448.
_ALGORITHMS: dict[tuple[object, object], tuple[str, ...]] = {
    ("OKP", "Ed25519"): ("EdDSA",),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("RSA", None): ("RS256", "PS256"),
}
# Accepted in a file only: a key with a URL is no secret.
_SECRETS: dict[tuple[object, object], tuple[str, ...]] = {("oct", None): ("HS256",)}
_RSA_BITS = 2048
_SECRET_BYTES = 32
_REMEMBERED = 10_000  # tokens; about 3 MB


class UnusableKeyError(Exception):
    """A key of a key set cannot be used. The message is the reason."""


@dataclass(frozen=True)
class Key:
    """A key that verifies tokens."""

    kid: str | None
    algorithms: tuple[str, ...]
    material: Any = field(repr=False)


class Keys:
    """The keys of a key set, and the tokens that they have verified. Other keys must verify these tokens again."""

    def __init__(self, listed: list[Key]) -> None:
        """Create it without verified tokens."""
        self.listed = listed
        self._verified: dict[bytes, tuple[str, float]] = {}
        self._lock = threading.Lock()

    def has(self, kid: str) -> bool:
        """Return whether a key has this id."""
        return any(key.kid == kid for key in self.listed)

    def find(self, kid: str | None, algorithm: object) -> Key | None:
        """Return the one key that a token may be signed with, or None if no key or several keys fit.

        A token without the id of a key may be signed with any key.
        """
        fitting = [key for key in self.listed if kid in {None, key.kid} and algorithm in key.algorithms]
        return fitting[0] if len(fitting) == 1 else None

    def verified(self, digest: bytes) -> tuple[str, float] | None:
        """Return the user of a token that was verified, and when the token expires, or None."""
        return self._verified.get(digest)

    def remember(self, digest: bytes, user_id: str, expires: float) -> None:
        """Remember a token by its hash. If there are too many, forget the oldest one."""
        with self._lock:
            if len(self._verified) >= _REMEMBERED and digest not in self._verified:
                del self._verified[next(iter(self._verified))]
            self._verified[digest] = user_id, expires


def load(source: str) -> list[Key]:
    """Return the keys of a key set that can be used. ``source`` is a URL, or the path of a file.

    A URL may list keys for other purposes, which are left out. In a file, a key that cannot be used is a mistake.

    Raises:
        KeySetError: the key set cannot be fetched or read, or a key in the file cannot be used.

    """
    found = []
    if "://" in source:
        for jwk in _parse(fetch(source)):
            with suppress(UnusableKeyError):
                found.append(_key(jwk, _ALGORITHMS))
        return found
    for number, jwk in enumerate(_parse(_read(Path(source))), start=1):
        try:
            found.append(_key(jwk, _ALGORITHMS | _SECRETS))
        except UnusableKeyError as error:
            raise KeySetError(f"key {number} cannot be used: {error}") from error
    if not found:
        raise KeySetError("the file has no keys")
    return found


def check(source: str) -> int:
    """Return the number of keys that can be used of a key set. ``source`` is a URL, or the path of a file.

    Raises:
        StartError: there is none, or the key set cannot be fetched or read.

    """
    shown = source.partition("?")[0] if "://" in source else source  # a query may have a password
    try:
        found = load(source)
    except KeySetError as error:
        raise StartError(f"AUTH_JWKS: {shown}: {error}") from error
    if not found:
        raise StartError(f"AUTH_JWKS: {shown}: it has no key that can be used")
    return len(found)


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for somebody who writes
            raise KeySetError("it is not a file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise KeySetError(f"it cannot be read: {getattr(error, 'strerror', None) or 'the path is invalid'}") from error
    if len(data) > MAX_BYTES:
        raise KeySetError(f"it is larger than {MAX_BYTES} bytes")
    return data


def _parse(data: bytes) -> list[Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise KeySetError("it is not JSON") from error
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise KeySetError('it is not a key set, such as {"keys": [...]}')
    return listed


def _key(jwk: Any, allowed: dict[tuple[object, object], tuple[str, ...]]) -> Key:
    """Return a key.

    Raises:
        UnusableKeyError: it may not verify tokens, or it is weak or invalid.

    """
    if not isinstance(jwk, dict):
        raise UnusableKeyError("it is not a JSON object")
    kind = (jwk.get("kty"), jwk.get("crv"))
    algorithms = next((algorithms for known, algorithms in allowed.items() if known == kind), ())
    if "alg" in jwk:
        algorithms = tuple(algorithm for algorithm in algorithms if algorithm == jwk["alg"])
    if not algorithms:
        raise UnusableKeyError("its kty, crv and alg are not those of an accepted algorithm")
    if jwk.get("use", "sig") != "sig" or not _may_verify(jwk.get("key_ops", ["verify"])):
        raise UnusableKeyError("its use or its key_ops is another one than to verify signatures")
    if not isinstance(kid := jwk.get("kid"), str | None):
        raise UnusableKeyError("its kid is not a string")
    if "d" in jwk:
        raise UnusableKeyError("it is a private key, which belongs to the issuer alone")
    return Key(kid, algorithms, _material(jwk, algorithms[0]))


def _may_verify(operations: object) -> bool:
    return isinstance(operations, list) and "verify" in operations


def _material(jwk: dict[str, Any], algorithm: str) -> Any:
    try:
        material = jwt.PyJWK(jwk, algorithm).key
    except Exception as error:  # the libraries do not say what they raise for any JSON
        raise UnusableKeyError("its numbers are not those of a key") from error
    if jwk["kty"] == "RSA" and material.key_size < _RSA_BITS:
        raise UnusableKeyError(f"an RSA key needs {_RSA_BITS} bits")
    if jwk["kty"] == "oct" and len(material) < _SECRET_BYTES:
        raise UnusableKeyError(f"a secret key needs {8 * _SECRET_BYTES} bits")
    return material
