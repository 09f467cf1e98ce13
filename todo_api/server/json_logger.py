"""gunicorn's logger with LOG_FORMAT=json: its lines are JSON objects like those of the service."""

from typing import Any

from gunicorn import glogging


class JsonLogger(glogging.Logger):
    """gunicorn's logger, which passes its lines on to the service's log, unless they go to a file."""

    def setup(self, cfg: Any) -> None:
        """Set up the logger, at the start and at each reload."""
        super().setup(cfg)
        if cfg.errorlog == "-":
            self.error_log.handlers.clear()
            self.error_log.propagate = True
