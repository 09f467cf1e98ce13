"""The API over HTTP, tested with one running service."""
