"""The log: one line for each event and each request, on standard error."""

import logging
import sys


def configure() -> None:
    """Send the log to standard error. The program calls this; ``create_app`` leaves the log to its caller."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("yoyo").setLevel(logging.WARNING)
    # The pool warns of each attempt to connect that fails. An Outage logs one line for all of them.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
