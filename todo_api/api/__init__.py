"""The HTTP API. This package imports neither psycopg nor gunicorn, and contains no SQL."""
