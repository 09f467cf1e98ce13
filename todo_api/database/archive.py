"""Reads the script that pg_restore writes for a backup: rows of tables, and the number at which ids go on.

Nothing of the script is run as SQL. A line that a backup of this service does not have makes the file a foreign one.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from todo_api.config import StartError

_NAME = rb'(?:[a-z_][a-z0-9_$]*|"(?:[^"]|"")+")'
_COPY = re.compile(rb"COPY (?:%(name)s\.)?(%(name)s) \((%(name)s(?:, %(name)s)*)\) FROM stdin;" % {b"name": _NAME})
_NEXT_ID = re.compile(rb"SELECT pg_catalog\.setval\(.+, ([0-9]{1,19}), (true|false)\);")
# What else pg_restore writes: comments, its own settings, and psql's \restrict.
_REST = re.compile(
    rb"(?:--.*|SET client_encoding = 'UTF8';|SET (?!client_encoding)[a-z_]+ = [^;]*;"
    rb"|SELECT pg_catalog\.set_config\('search_path', '', false\);|\\(?:un)?restrict \w+)?"
)
_END = b"\\.\n"  # of the rows


@dataclass(frozen=True)
class Rows:
    """The rows of a table, in PostgreSQL's text format, one a line. They are read before the next part is."""

    table: str
    columns: list[str]
    lines: Iterator[bytes]


def parts(script: Iterable[bytes]) -> Iterator[Rows | int]:
    """Return the parts of a script: the rows of each table, and the next id.

    Raises:
        StartError: the script is not that of a backup.

    """
    lines = iter(script)
    for line in lines:
        text = line.rstrip(b"\n")
        if copy := _COPY.fullmatch(text):
            columns = [_unquoted(name) for name in re.findall(_NAME, copy[2])]
            rows = Rows(_unquoted(copy[1]), columns, _until_end(lines))
            yield rows
            for _ in rows.lines:  # those that the caller did not read
                pass
        elif next_id := _NEXT_ID.fullmatch(text):
            yield int(next_id[1]) + (next_id[2] == b"true")
        elif not _REST.fullmatch(text):
            raise StartError("the file is not a backup of this service: it has more than the rows of its tables")


def _until_end(lines: Iterator[bytes]) -> Iterator[bytes]:
    for line in lines:
        if line == _END:
            return
        yield line
    raise StartError("the file is not complete")


def _unquoted(name: bytes) -> str:
    text = name.decode(errors="replace")
    return text[1:-1].replace('""', '"') if text.startswith('"') else text
