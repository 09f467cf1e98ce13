"""The commands of ``flask``: migrate, check, psql, backup and restore. flask-smorest adds ``flask openapi``."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from flask import Flask

from todo_api import backup as backups
from todo_api import checks, config, database, embedded, startup

# Click itself would reject an unreadable file, in several lines.
_FILE = click.argument("file", type=click.Path(path_type=Path, readable=False))


def init_app(app: Flask, settings: config.Settings, version: str) -> None:
    """Add the commands to ``flask``. ``version`` is that of the service."""

    @app.cli.command()
    def migrate() -> None:
        """Apply the migrations that are not applied yet."""
        with _ends_in_one_line():
            startup.prepare_patiently(settings)
        click.echo("The database is up to date.")

    @app.cli.command()
    def check() -> None:
        """Show how the service and its database are, one line each. The exit status is 1 if something is wrong."""
        with _ends_in_one_line():
            failed = False
            for finding in checks.run(settings, version):
                click.echo(finding)
                failed |= not finding.is_ok
        raise SystemExit(failed)

    @app.cli.command()
    @_FILE
    def backup(file: Path) -> None:
        """Write all tasks to a new FILE. The service may run meanwhile."""
        with _ends_in_one_line():
            done = backups.write(settings, file, _show)
        click.echo(f"The backup is in {click.format_filename(file)}: {done}.")

    @app.cli.command()
    @_FILE
    def restore(file: Path) -> None:
        """Restore the backup in FILE into a database without tasks: all of it, or nothing."""
        with _ends_in_one_line():
            done = backups.restore(settings, file, _show)
        click.echo(f"The backup is restored: {done}.")
        with _ends_in_one_line():
            startup.prepare_patiently(settings)

    @app.cli.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def psql(arguments: tuple[str, ...]) -> None:
        """Run psql on the service's database. All arguments are passed to psql."""
        with _ends_in_one_line():
            conninfo = startup.ensure_server(settings)
            variables, rest = database.libpq_variables(conninfo)
            program = embedded.psql(settings.postgres_bin)
        if database.asks_for_tls(conninfo) and not embedded.has_tls(program):
            startup.fail(
                f"DATABASE_URL requires TLS, which {program} does not support: install the psql of your system"
            )
        config.set_libpq_variables(variables)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for psql, which cancels its statement
        raise SystemExit(subprocess.call([program, *(["-d", rest] if rest else []), *arguments]))


@contextmanager
def _ends_in_one_line() -> Iterator[None]:
    """End the command with one line if the block fails, and normally on SIGHUP, SIGQUIT and SIGTERM.

    A normal exit stops the embedded server.
    """
    numbers = (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM)
    startup.exit_on(*numbers, status=lambda number: 128 + number)  # as shells do
    try:
        yield
    except (config.StartError, database.UnavailableError) as error:
        _show("")
        startup.fail(error)
    _show("")


def _show(progress: str) -> None:
    """Show the progress of a command on a terminal, in place of what was shown before."""
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{progress}", err=True, nl=False)
