"""The log on standard error: one line for each event and each request. In the text format, a traceback adds lines.

In the text format, gunicorn's own lines have gunicorn's format. With LOG_FORMAT=json, every line is a JSON object,
whoever writes it.
"""

import io
import json
import logging
import sys
import threading
from datetime import UTC, datetime
from typing import Any, TextIO

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object. It includes the ``fields`` that the record was given as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON object of a record."""
        members = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            members["traceback"] = self.formatException(record.exc_info)
        return json.dumps(members)


class _JsonLines(io.TextIOBase):
    """Standard error for everything that is not logged: each line that is written becomes a JSON object."""

    def __init__(self, stream: TextIO) -> None:
        """Create it in front of the real standard error."""
        self.stream = stream
        self._begun = ""  # the line that is not complete yet

    def write(self, text: str) -> int:
        """Write the lines that are complete now.

        Raises:
            TypeError: it is given bytes. Click, which prints the errors of commands, tries that first.

        """
        if not isinstance(text, str):
            raise TypeError("a text is needed, not bytes")
        *lines, self._begun = f"{self._begun}{text}".split("\n")
        for line in filter(str.strip, lines):
            record = logging.LogRecord("stderr", logging.ERROR, "", 0, line, None, None)
            self.stream.write(f"{JsonFormatter().format(record)}\n")
        return len(text)

    def flush(self) -> None:
        """Flush the real standard error."""
        self.stream.flush()

    def fileno(self) -> int:
        """Return the file descriptor of the real standard error."""
        return self.stream.fileno()


def configure(log_format: str, level: str) -> None:
    """Send the log to standard error, in a format ("text" or "json"), from a level on ("debug", "info", ...).

    The entry points, wsgi.py and gunicorn_conf.py, call this. ``create_app`` does not: its caller configures the log.
    At the level "debug" there are gunicorn's own lines in addition, but not those of other libraries.
    """
    if log_format == "json":
        use_json()
    stream = sys.stderr.stream if isinstance(sys.stderr, _JsonLines) else sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(_FORMAT))
    logging.basicConfig(handlers=[handler])
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger().setLevel(max(number, logging.INFO))
    logging.getLogger("yoyo").setLevel(max(number, logging.WARNING))
    # psycopg's pool logs a warning for each failed attempt to connect. Outage logs one line for all of them.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)


def use_json() -> None:
    """Write everything that this process writes to standard error as JSON, including what is not logged."""
    if not sys.stderr or isinstance(sys.stderr, _JsonLines):  # it may be closed
        return
    sys.stderr = _JsonLines(sys.stderr)
    logging.captureWarnings(capture=True)
    sys.excepthook = lambda *error: _log_uncaught(error)
    threading.excepthook = lambda error: _log_uncaught((error.exc_type, error.exc_value, error.exc_traceback))


def _log_uncaught(error: Any) -> None:
    logging.getLogger("todo_api").critical("uncaught exception", exc_info=error)
