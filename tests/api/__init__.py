"""The behaviour of the calls over HTTP, through one running service."""
