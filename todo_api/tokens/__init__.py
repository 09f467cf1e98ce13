"""Verifies JSON Web Tokens (RFC 7519) of an issuer such as Better Auth, with the public keys of the issuer.

This package knows no Flask, no gunicorn and no requests of clients. Other packages use only the names in
``__all__``. Without AUTH_JWKS, nothing of it runs, and neither PyJWT nor cryptography is imported.
"""

from collections.abc import Callable

from todo_api.config import Settings
from todo_api.tokens.errors import InvalidTokenError, KeysUnavailableError
from todo_api.tokens.key_set import start_fetching

__all__ = [
    "InvalidTokenError",
    "KeysUnavailableError",
    "check_key_file",
    "check_keys",
    "create_verifier",
    "start_fetching",
]


def create_verifier(settings: Settings) -> Callable[[str], str] | None:
    """Return the function that verifies a token and returns its user's id, or None without AUTH_JWKS.

    The function raises InvalidTokenError or KeysUnavailableError. Nothing is fetched before its first call.
    """
    if not settings.auth_jwks:
        return None
    from todo_api.tokens.verifier import Verifier

    return Verifier(settings.auth_jwks, settings.auth_issuer, settings.auth_audience).user_id


def check_keys(settings: Settings) -> int:
    """Fetch or read the key set of AUTH_JWKS, and return the number of its keys that can verify tokens.

    Raises:
        StartError: it cannot be fetched or read, or has no such key.

    """
    from todo_api.tokens import keys

    return keys.check(settings.auth_jwks)


def check_key_file(settings: Settings) -> None:
    """Check the key set if AUTH_JWKS is a file.

    Raises:
        StartError: the file cannot be read, is not a key set, or has a key that cannot be used.

    """
    if settings.auth_jwks and "://" not in settings.auth_jwks:
        from todo_api.tokens import keys

        keys.check(settings.auth_jwks)
