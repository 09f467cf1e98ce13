"""The files in sql/, which psql runs unchanged, as statements with bound parameters.

A file holds one statement. A parameter is written ``:'name'::type``, as a quoted variable of psql; the loader turns it
into a bound parameter, never into text. Lines before the statement that start with a backslash give psql its defaults;
the loader leaves them out. Anything else that psql would replace, or might read differently, is an error when the file
is loaded.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from todo_api.database.errors import InvalidValueError

SQL = Path(__file__).resolve().parents[2] / "sql"
MIGRATIONS = SQL / "migrations"

# Stands between the elements of an array of rows. No string in JSON contains it, because a line break is escaped there.
SEPARATOR = b",\n"

# The rules of psql's own lexer, src/fe_utils/psqlscan.l in PostgreSQL's sources. flex does not backtrack, and neither
# does *+. What these lines do not cover (nested comments, a string without an end, ...) is an error.
_COMMENT = r"(?: --[^\n\r]* | /\*(?:(?!/\*).)*?\*/ )"
_BLANK = rf"(?: \s | {_COMMENT} )"
_NOT_IN_A_NAME = r"(?<![\w$\x80-\U0010ffff])"  # in type'…' and a$b$, the e and the $ are part of the name
_FLAGS = re.VERBOSE | re.DOTALL | re.MULTILINE | re.ASCII
# After \\ in a line, psql reads SQL again: such a line cannot be left out.
_HEAD = re.compile(rf"(?: {_BLANK} | ^(?=\\)(?:(?!\\\\)[^\n])+$ )*+", _FLAGS)
_TOKEN = re.compile(
    rf"""
      (?P<comment>   {_COMMENT} )
    | (?P<quoted>    {_NOT_IN_A_NAME}[eE]'(?:[^'\\]|\\.|'')*+'(?!{_BLANK}*+')  # not continued by a second '…'
                   | (?<!{_NOT_IN_A_NAME}[eE])'(?:[^']|'')*+'
                   | "(?:[^"]|"")*+"
                   | {_NOT_IN_A_NAME}(?P<tag>\$(?:[a-zA-Z_]\w*)?\$).*?(?P=tag) )
    | (?<=[\s(,\[]):'(?P<parameter>[a-z_][a-z0-9_]*)'(?=::[a-z])
    | (?P<cast>      :: )
    | (?P<variable>  :['"{{]?\w* )
    | (?P<end>       ;(?:;|{_BLANK})*\Z )
    | (?P<more>      ; )
    | (?P<unclear>   ['"$\\\0] | /\* )
    """,
    _FLAGS,
)
_ERRORS = {
    "variable": "a parameter is written :'name'::type, after white space or a bracket; a colon has no other use",
    "more": "a file holds one statement",
    "unclear": "psql may read this differently: as a command, as a name with $, or as a string or comment that has no "
    "end, is nested or is continued",
}


class StatementError(Exception):
    """psql and PostgreSQL would read a .sql file differently."""


@dataclass(frozen=True)
class Statement:
    """One .sql file, with $1, $2 and so on for its parameters.

    ``rows`` is the file's statement. ``row_json`` returns its only row as a JSON object (no row if there is none).
    ``rows_json`` returns its rows as the text of one JSON array, in their order, and their number.
    """

    parameters: tuple[str, ...]
    rows: bytes
    row_json: bytes
    rows_json: bytes

    def values(self, given: Mapping[str, object]) -> list[bytes]:
        """Return the values of the parameters in their order, as texts in UTF-8.

        Raises:
            InvalidValueError: a text has a NUL or a lone surrogate, which PostgreSQL cannot hold.

        """
        texts = [str(given[name]) for name in self.parameters]
        if "\0" in "".join(texts):  # libpq would cut the value there
            raise InvalidValueError("a NUL")
        try:
            return [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise InvalidValueError("a lone surrogate") from error


def parse(name: str, text: str) -> Statement:
    """Return the statement of a file's text.

    Raises:
        StatementError: it has no statement or more than one, or psql and PostgreSQL would read it differently.

    """
    numbers: dict[str, int] = {}
    statement = _HEAD.sub("", text, count=1)

    def replace(token: re.Match[str]) -> str:
        match token.lastgroup:
            case "parameter":
                return f"${numbers.setdefault(token['parameter'], len(numbers) + 1)}"
            case "comment":
                return " "  # as in PostgreSQL: a/**/b is two words
            case "end":
                return ""
            case str(kind) if kind in _ERRORS:
                line = text.count("\n", 0, len(text) - len(statement) + token.start()) + 1
                raise StatementError(f"{name}.sql, line {line}: {token[0]}: {_ERRORS[kind]}")
            case _:
                return token[0]

    rows = _TOKEN.sub(replace, statement).strip()
    if not rows:
        raise StatementError(f"{name}.sql has no statement")
    parts = _as_row(name, rows)
    elements = f"string_agg(row_to_json(row)::text, '{SEPARATOR.decode()}')"
    return Statement(
        parameters=tuple(numbers),
        rows=rows.encode(),
        row_json=f"{parts} SELECT row_to_json(row) FROM row".encode(),
        rows_json=f"{parts} SELECT concat('[', {elements}, ']'), count(*) FROM row".encode(),
    )


def _as_row(name: str, rows: str) -> str:
    """Return a WITH clause that has the statement as its last part, named "row".

    If the statement has a WITH clause of its own, that one is extended: PostgreSQL allows parts that write at the top
    level only.
    """
    if not rows.startswith("WITH"):
        return f"WITH row AS ({rows})"
    # The parts are indented, as sqlfluff checks. The statement after them starts at the left edge.
    parts, *statement = re.split(r"(?m)^(?=(?:SELECT|INSERT|UPDATE|DELETE)\b)", rows)
    if len(statement) != 1:
        raise StatementError(f"{name}.sql: after the WITH clause, one SELECT, INSERT, UPDATE or DELETE starts a line")
    return f"{parts.rstrip()}, row AS ({statement[0]})"


@functools.cache
def load(folder: Path = SQL) -> dict[str, Statement]:
    """Return every statement below a folder by its name: ``tasks/list`` is ``tasks/list.sql``.

    Raises:
        StatementError: a file is invalid, or the folder has no statement.

    """
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.sql"))}
    found = {
        # Read as psql reads it: without a byte order mark, and with the carriage returns in strings.
        name: parse(name, path.read_bytes().decode("utf-8-sig"))
        for name, path in files.items()
        if not name.startswith("migrations/")  # yoyo reads these
    }
    if not found:
        raise StatementError(f"{folder} has no .sql file")
    return found
