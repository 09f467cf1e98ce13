"""The user of a request."""

from flask import current_app


def current_user() -> str:
    """Return the id of the user who owns the tasks that this request can use. There is no authentication yet."""
    user_id: str = current_app.config["USER_ID"]
    return user_id
