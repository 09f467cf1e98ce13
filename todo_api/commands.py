"""The commands: ``flask migrate`` and ``flask psql``; flask-smorest brings ``flask openapi``."""

import signal
import subprocess
import sys

import click
from flask import Flask

from todo_api import config, database, database_url, embedded, startup


def init_app(app: Flask, settings: config.Settings) -> None:
    """Add the commands to ``flask``."""

    @app.cli.command()
    def migrate() -> None:
        """Apply the migrations that are not applied yet."""
        _leave_in_order()
        try:
            startup.prepare(settings)
        except (config.StartError, database.Unavailable) as error:
            config.fail(error)
        click.echo("The database is up to date.")

    @app.cli.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def psql(arguments: tuple[str, ...]) -> None:
        """Run psql on the service's database; every argument is psql's."""
        _leave_in_order()
        try:
            variables, rest = database_url.as_variables(startup.find(settings))
        except config.StartError as error:
            config.fail(error)
        config.set_libpq_variables(variables)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is psql's: it cancels a statement there
        raise SystemExit(subprocess.call([embedded.psql(), *(["-d", rest] if rest else []), *arguments]))


def _leave_in_order() -> None:
    """Let a closed terminal or a SIGTERM end the command as its last line does: an embedded server is stopped."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))  # the status that shells give it
