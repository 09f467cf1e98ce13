"""A todo backend: a REST API over PostgreSQL with its SQL in .sql files."""

import click
from flask import Flask

from todo_api import commands, config, database, docs, health, middleware, openapi, problems, startup, tasks
from todo_api.app import App


def create_app(settings: config.Settings | None = None) -> Flask:
    """Put the parts together."""
    settings = settings or config.load()
    app = App(__name__, static_folder=None)
    app.config.update(USER_ID=settings.user_id, MAX_CONTENT_LENGTH=settings.max_body_bytes)
    app.url_map.merge_slashes = False  # two slashes within a path are another URL: a 404, not a redirect

    middleware.init_app(app, settings.cors_origins)
    problems.init_app(app)
    database.init_app(
        app, lambda: startup.prepare(settings), connections=settings.web_threads, pooler=settings.database_pooler
    )
    tasks.init_app(app, openapi.init_app(app))
    docs.init_app(app)
    app.register_blueprint(health.blueprint)
    commands.init_app(app, settings)

    if not click.get_current_context(silent=True):  # one of flask's commands knows best whether it needs the database
        startup.prepare_or_fail(settings)
    return app
