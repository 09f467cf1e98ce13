"""The WSGI application; run as a program it becomes gunicorn with the settings of todo_api/gunicorn_conf.py."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parent)
    gunicorn = [sys.executable, "-m", "gunicorn", "-c", "python:todo_api.gunicorn_conf", "wsgi:app"]
    os.execv(sys.executable, [*gunicorn, *sys.argv[1:]])

from todo_api import create_app

app = create_app()
