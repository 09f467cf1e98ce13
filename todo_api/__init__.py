"""A todo backend: a REST API over PostgreSQL with its SQL in .sql files."""

from flask import Flask

from todo_api import commands, config, startup, tokens
from todo_api.api import body, cors, docs, health, identity, middleware, openapi, origins, problems, tasks
from todo_api.api.application import Application
from todo_api.database import Database
from todo_api.metrics import metrics


def create_app(settings: config.Settings | None = None) -> Flask:
    """Return the application. It connects to its database at the first request, or when a server fills its pool.

    Raises:
        StartError: no settings are given, and those in the environment are invalid.
        StatementError: the files in sql/ are invalid.

    """
    settings = settings or config.load()
    app = Application(__name__, static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=settings.max_body_bytes)
    app.config["APPLICATION_ROOT"] = settings.url_prefix + settings.script_name or "/"
    app.extensions["database"] = Database(
        lambda: startup.prepare(settings),
        get_share=lambda: startup.connection_share(settings),
        pooler=settings.database_pooler,
        role=settings.database_role,
    )

    observe = metrics.observe if settings.metrics_port else None
    app.wsgi_app = middleware.RequestLog(middleware.Mount(app.wsgi_app, settings.url_prefix), observe)
    cors.init_app(app, settings.cors_origins)
    origins.init_app(app, settings)
    body.init_app(app)
    identity.init_app(app, settings.user_id, tokens.create_verifier(settings))  # after the body is read
    tasks.init_app(app, openapi.init_app(app, needs_token=bool(settings.auth_jwks)))
    docs.init_app(app)
    health.init_app(app)
    problems.init_app(app)
    commands.init_app(app, settings, str(app.config["API_VERSION"]))
    return app
