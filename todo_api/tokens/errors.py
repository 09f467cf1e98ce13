"""The errors of this package."""


class InvalidTokenError(Exception):
    """The token is invalid. The error has no message, because a client must not learn the reason."""


class KeysUnavailableError(Exception):
    """There are no keys now that could verify the token."""


class KeySetError(Exception):
    """The key set cannot be fetched or read. The message is the reason, without any text of the issuer."""
