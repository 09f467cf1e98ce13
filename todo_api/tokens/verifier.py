"""Verifies tokens, and remembers those that it has verified."""

import hashlib
import re
import time
from typing import Any

import jwt

from todo_api.tokens.errors import InvalidTokenError, KeysUnavailableError
from todo_api.tokens.key_set import WAIT, KeySet
from todo_api.tokens.keys import Keys, load

_LEEWAY = 30  # seconds by which the clocks may differ
_TYPES = {"jwt", "at+jwt"}  # of access tokens; issuers sign other kinds of tokens with the same keys
_COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")  # three segments; encrypted tokens have five
_MOST_CHARACTERS = 255  # of a user's id
_TIMES = ("exp", "nbf", "iat")
_REQUIRED = ["exp", "sub", "iss", "aud"]


class Verifier:
    """Verifies the tokens of one issuer for one audience."""

    def __init__(self, source: str, issuer: str, audience: str) -> None:
        """Create it without keys. ``source`` is the URL or the file of the key set."""
        self._issuer, self._audience = issuer, audience
        self._key_set = KeySet(source, lambda: Keys(load(source)))

    def user_id(self, token: str) -> str:
        """Return the id of the user whose token this is.

        Raises:
            InvalidTokenError: the token is not from this issuer, not for this audience, or not valid now.
            KeysUnavailableError: there are no keys now that could verify it.

        """
        deadline = time.monotonic() + WAIT
        keys = self._key_set.current(deadline)
        digest = hashlib.sha256(token.encode()).digest()
        if known := keys.verified(digest):
            user_id, expires = known
            if time.time() < expires:
                return user_id
        try:
            return self._verify(token, digest, keys, deadline)
        except (InvalidTokenError, KeysUnavailableError):
            raise
        except Exception:  # jwt's errors, and all others that a token may cause; a message may have a part of the token
            raise InvalidTokenError from None

    def _verify(self, token: str, digest: bytes, keys: Keys, deadline: float) -> str:
        if not _COMPACT.fullmatch(token):
            raise InvalidTokenError
        header = jwt.get_unverified_header(token)
        kid = header.get("kid")
        if not _is_supported(header):
            raise InvalidTokenError
        if kid is not None and not keys.has(kid):
            keys = self._key_set.newer(deadline)
        if not (key := keys.find(kid, header.get("alg"))):
            raise InvalidTokenError
        claims = jwt.decode(
            token,
            key.material,
            algorithms=list(key.algorithms),
            issuer=self._issuer,
            audience=self._audience,
            leeway=_LEEWAY,
            options={"require": _REQUIRED},
        )
        user_id: str = claims["sub"]
        if not _is_user_id(user_id) or not all(_is_number(claims[name]) for name in _TIMES if name in claims):
            raise InvalidTokenError
        keys.remember(digest, user_id, claims["exp"])
        return user_id


def _is_supported(header: dict[str, Any]) -> bool:
    """Return whether the token is of an accepted type and needs no extension."""
    media_type = header.get("typ", "JWT")
    return (
        isinstance(media_type, str)
        and media_type.lower().removeprefix("application/") in _TYPES
        and not header.keys() & {"crit", "b64"}
    )


def _is_user_id(value: Any) -> bool:
    # A text of printable characters has no NUL and no lone surrogate, which PostgreSQL's text cannot hold.
    return isinstance(value, str) and 1 <= len(value) <= _MOST_CHARACTERS and value.isprintable()


def _is_number(value: Any) -> bool:
    """Return whether a claim is a JSON number. jwt also accepts a number in a string, and true."""
    return isinstance(value, int | float) and not isinstance(value, bool)
