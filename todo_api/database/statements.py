"""Loads the files in sql/, which psql runs unchanged, as statements with bound parameters.

A file contains one statement. A parameter is written ``:'name'::type``, a quoted variable of psql with a cast. The
loader turns it into a bound parameter, never into text. Lines that start with a backslash, before the statement, set
psql's defaults; the loader leaves them out. The loader rejects a file in which psql would replace anything else, or
which psql may read differently.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from todo_api.database.errors import InvalidValueError

_OTHERS = "migrations/", "citus/"  # the folders that yoyo and psql read
SQL = Path(__file__).resolve().parents[2] / "sql"
MIGRATIONS = SQL / "migrations"

# Separates the elements of an array of rows: array_to_json() can put line breaks between them. It occurs in no JSON
# string, because a line break is escaped there.
SEPARATOR = b",\n "

# PostgreSQL calls the function once for each array, in their order.
_ARRAYS = """
SELECT array_to_json(rows[first : first + 3999], true), least(cardinality(rows) - first + 1, 4000)
FROM (SELECT array_agg(row) AS rows FROM row) AS page, generate_series(1, cardinality(rows), 4000) AS first
""".strip()

# These patterns follow psql's own lexer, src/fe_utils/psqlscan.l in PostgreSQL's sources. flex does not backtrack, and
# neither does *+. Syntax that they do not cover (nested comments, strings without an end, ...) is rejected.
_COMMENT = r"(?: --[^\n\r]* | /\*(?:(?!/\*).)*?\*/ )"
_BLANK = rf"(?: \s | {_COMMENT} )"
_NOT_IN_A_NAME = r"(?<![\w$\x80-\U0010ffff])"  # in type'…' and a$b$, the e and the $ are part of the name
_FLAGS = re.VERBOSE | re.DOTALL | re.MULTILINE | re.ASCII
# After \\ in a line, psql reads SQL again. So a line with \\ cannot be left out.
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
    "variable": "a parameter is written :'name'::type, after white space, a comma or an opening bracket; outside of "
    "quotes and comments, the only other use of a colon is a cast, ::",
    "more": "a file holds one statement",
    "unclear": "psql may read this differently: as a command, as a name with $, or as a string or comment that has no "
    "end, is nested or is continued",
}


class StatementError(Exception):
    """A .sql file is missing, has no statement or several, or may be read differently by psql and PostgreSQL."""


@dataclass(frozen=True)
class Statement:
    """The statement of a .sql file, with $1, $2 and so on in place of its parameters.

    ``rows`` is the statement itself. ``row_json`` is a statement that returns each row as a JSON object. ``rows_json``
    is a statement that returns all rows in their order, as JSON arrays of up to 4000 rows each, and the number of rows
    in each array. For one array of all rows, PostgreSQL would need four times its size in memory.
    """

    parameters: tuple[str, ...]
    rows: bytes
    row_json: bytes
    rows_json: bytes

    def query(self, **given: object) -> tuple[bytes, list[bytes]]:
        """Return the statement itself and the values of its parameters.

        Raises:
            InvalidValueError: a value contains a NUL or a lone surrogate, which PostgreSQL cannot store.

        """
        return self.rows, self.values(given)

    def values(self, given: Mapping[str, object]) -> list[bytes]:
        """Return the values of the parameters in their order, as UTF-8 text.

        Raises:
            InvalidValueError: a value contains a NUL or a lone surrogate, which PostgreSQL cannot store.

        """
        texts = [str(given[name]) for name in self.parameters]
        if "\0" in "".join(texts):  # libpq would cut the value there
            raise InvalidValueError("a value contains a NUL")
        try:
            return [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise InvalidValueError("a value contains a lone surrogate") from error


def parse(name: str, text: str) -> Statement:
    """Return the statement of a file with this name and text.

    Raises:
        StatementError: the text has no statement or several, psql and PostgreSQL may read it differently, or its WITH
            clause cannot be extended.

    """
    numbers: dict[str, int] = {}
    statement = _HEAD.sub("", text, count=1)

    def replace(token: re.Match[str]) -> str:
        match token.lastgroup:
            case "parameter":
                return f"${numbers.setdefault(token['parameter'], len(numbers) + 1)}"
            case "comment":
                return " "  # as PostgreSQL does: a/**/b is two words
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
    return Statement(
        parameters=tuple(numbers),
        rows=rows.encode(),
        row_json=f"{parts} SELECT row_to_json(row) FROM row".encode(),
        rows_json=f"{parts} {_ARRAYS}".encode(),
    )


def _as_row(name: str, rows: str) -> str:
    """Return a WITH clause whose last part is the statement, named "row".

    If the statement has a WITH clause, that clause is extended, because PostgreSQL allows parts that write (INSERT,
    UPDATE, DELETE) only in the outermost WITH clause.
    """
    if not rows.startswith("WITH"):
        return f"WITH row AS ({rows})"
    # sqlfluff checks that the statements inside the parts are indented. The last one starts at the beginning of a line.
    parts, *statement = re.split(r"(?m)^(?=(?:SELECT|INSERT|UPDATE|DELETE)\b)", rows)
    if len(statement) != 1:
        raise StatementError(
            f"{name}.sql: after WITH, exactly one line must start with SELECT, INSERT, UPDATE or DELETE"
        )
    return f"{parts.rstrip()}, row AS ({statement[0]})"


def _text_of(name: str, path: Path) -> str:
    # As in psql, a byte order mark is ignored, and carriage returns in strings are kept.
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StatementError(f"{name}.sql is not UTF-8: {error}") from error


@functools.cache
def load(folder: Path = SQL) -> dict[str, Statement]:
    """Return the statements in a folder and its subfolders by name: ``tasks/list`` is ``tasks/list.sql``.

    Raises:
        StatementError: a file is invalid, or the folder has no statement.

    """
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.sql"))}
    found = {name: parse(name, _text_of(name, path)) for name, path in files.items() if not name.startswith(_OTHERS)}
    if not found:
        raise StatementError(f"{folder} has no .sql file")
    return found
