"""The database of the current application, as a proxy like Flask's ``current_app``."""

from typing import cast

from flask import current_app
from werkzeug.local import LocalProxy

from todo_api.database import Database

database = cast("Database", LocalProxy(lambda: current_app.extensions["database"]))
