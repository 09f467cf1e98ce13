"""The WSGI application. Run as a program, it becomes gunicorn with the settings of todo_api/server/gunicorn_conf.py."""

import click

from todo_api import create_app, logs, startup

settings = startup.load_settings()

from todo_api import server  # not before: gunicorn reads WEB_CONCURRENCY when it is imported

if __name__ == "__main__":
    server.run()  # its workers import this file

logs.configure()
server.install_problems()
app = create_app(settings)
if not click.get_current_context(silent=True):  # each of flask's commands prepares what it needs itself
    startup.prepare_or_fail(settings)
