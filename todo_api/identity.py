"""Who is asking."""

from flask import current_app


def current_user() -> str:
    """Name the user whose tasks this request may see.

    A stub until there is authentication: the one user from the settings. Every statement takes its answer.
    """
    user_id: str = current_app.config["USER_ID"]
    return user_id
