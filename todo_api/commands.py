"""The commands ``flask migrate`` and ``flask psql``. flask-smorest adds the command ``flask openapi``."""

import signal
import subprocess
import sys

import click
from flask import Flask

from todo_api import config, database, embedded, startup


def init_app(app: Flask, settings: config.Settings) -> None:
    """Add the commands to ``flask``."""

    @app.cli.command()
    def migrate() -> None:
        """Apply the migrations that are not applied yet."""
        _exit_on_signals()
        try:
            startup.prepare_patiently(settings)
        except (config.StartError, database.UnavailableError) as error:
            startup.fail(error)
        click.echo("The database is up to date.")

    @app.cli.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def psql(arguments: tuple[str, ...]) -> None:
        """Run psql on the service's database. All arguments are passed to psql."""
        _exit_on_signals()
        try:
            conninfo = startup.ensure_server(settings)
            variables, rest = database.libpq_variables(conninfo)
            program = embedded.psql(settings.postgres_bin)
        except config.StartError as error:
            startup.fail(error)
        if database.asks_for_tls(conninfo) and not embedded.has_tls(program):
            startup.fail(
                f"DATABASE_URL requires TLS, which {program} does not support: install the psql of your system"
            )
        config.set_libpq_variables(variables)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for psql, which cancels its statement
        raise SystemExit(subprocess.call([program, *(["-d", rest] if rest else []), *arguments]))


def _exit_on_signals() -> None:
    """Exit normally on SIGHUP and SIGTERM, so that the exit stops the embedded server."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))  # the exit status that shells use
