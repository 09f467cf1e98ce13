"""The errors of this package."""


class InvalidTokenError(Exception):
    """The token proves nothing. There is no text, because nobody who sends tokens should learn what was wrong."""


class KeysUnavailableError(Exception):
    """There are no keys now that could verify the token."""


class KeySetError(Exception):
    """The key set cannot be fetched or read. The message is the reason; no part of it comes from the issuer."""
