"""Who is asking."""

from flask import current_app


def current_user() -> str:
    """Return the id of the user whose tasks this request may see: for now, the one user of the settings."""
    user_id: str = current_app.config["USER_ID"]
    return user_id
