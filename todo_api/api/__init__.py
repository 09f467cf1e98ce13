"""The HTTP API. This package knows no psycopg, no gunicorn and no SQL."""
