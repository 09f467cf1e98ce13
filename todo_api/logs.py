"""The log on standard error: one line for each event and each request. A traceback adds lines.

gunicorn's own lines have gunicorn's format.
"""

import logging
import sys


def configure() -> None:
    """Send the log to standard error.

    The entry points, wsgi.py and gunicorn_conf.py, call this. ``create_app`` does not: its caller configures the log.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("yoyo").setLevel(logging.WARNING)
    # psycopg's pool logs a warning for each failed attempt to connect. Outage logs one line for all of them.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
