"""The WSGI application; run as a program it becomes gunicorn with the settings of todo_api/gunicorn_conf.py."""

import sys

if __name__ == "__main__":
    from todo_api import config

    config.load()  # first: gunicorn reads WEB_CONCURRENCY, too, and where that is no number it ends with a traceback
    from gunicorn.app import wsgiapp

    sys.argv[1:1] = ["-c", "python:todo_api.gunicorn_conf", "wsgi:app"]
    sys.exit(wsgiapp.run(prog="gunicorn"))

from todo_api import create_app

app = create_app()
