"""The WSGI application. As a program, this file becomes gunicorn with the settings of server/gunicorn_conf.py."""

import os
import signal

if __name__ == "__main__":
    # The imports below take a second. Process 1 of a container ignores signals that have no handler. An exception would
    # be lost in some lines of an import, and there is nothing to clean up until server.run() sets other handlers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))

import click

from todo_api import create_app, logs, startup

is_command = bool(click.get_current_context(silent=True))
settings = startup.load_settings(*([1] if is_command else []))
logs.configure(settings.log_format, settings.log_level)

from todo_api import server  # after the check: gunicorn reads WEB_CONCURRENCY at its import

if __name__ == "__main__":
    server.run()  # does not return; gunicorn's workers import this file

server.install_problems()
app = create_app(settings)
if not is_command:  # each flask command prepares what it needs
    startup.prepare_or_fail(settings)
    server.check_hooks(settings)
