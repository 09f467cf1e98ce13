"""What a client sees: HTTP, and nothing else. This package knows no psycopg, no gunicorn and no SQL."""
