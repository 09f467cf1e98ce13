"""The database of the application that answers the current request."""

from typing import cast

from flask import current_app
from werkzeug.local import LocalProxy

from todo_api.database import Database

database = cast("Database", LocalProxy(lambda: current_app.extensions["database"]))
