"""Turns the files in sql/, which psql runs unchanged, into statements for psycopg.

A file holds one statement. ``:'name'::type`` in it is psql's quoted variable; here it becomes a bound parameter, never
text. Lines that start with a backslash, before the statement, give psql its defaults and are left out. Whatever else
psql would replace or might read differently is refused when the file is loaded, not when somebody calls it.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

SQL = Path(__file__).resolve().parent.parent / "sql"
MIGRATIONS = SQL / "migrations"

# The rules are those of psql's own lexer, src/fe_utils/psqlscan.l in PostgreSQL's sources, where *+ keeps "no going
# back" as flex does. What these few lines do not cover (nested comments, a string without an end, ...) is refused.
_COMMENT = r"(?: --[^\n\r]* | /\*(?:(?!/\*).)*?\*/ )"
_BLANK = rf"(?: \s | {_COMMENT} )"
_NOT_IN_A_NAME = r"(?<![\w$\x80-\U0010ffff])"  # in type'…' and a$b$ the e and the $ belong to the name
_FLAGS = re.VERBOSE | re.DOTALL | re.MULTILINE | re.ASCII
# psql goes on with SQL after \\, so a line with that is not one to leave out.
_HEAD = re.compile(rf"(?: {_BLANK} | ^(?=\\)(?:(?!\\\\)[^\n])+$ )*+", _FLAGS)
_TOKEN = re.compile(
    rf"""
      (?P<comment>   {_COMMENT} )
    | (?P<quoted>    {_NOT_IN_A_NAME}[eE]'(?:[^'\\]|\\.|'')*+'(?!{_BLANK}*+')  # not continued in a second '…'
                   | (?<!{_NOT_IN_A_NAME}[eE])'(?:[^']|'')*+'
                   | "(?:[^"]|"")*+"
                   | {_NOT_IN_A_NAME}(?P<tag>\$(?:[a-zA-Z_]\w*)?\$).*?(?P=tag) )
    | (?<=[\s(,\[]):'(?P<parameter>[a-z_][a-z0-9_]*)'(?=::[a-z])
    | (?P<cast>      :: )
    | (?P<variable>  :['"{{]?\w* )
    | (?P<end>       ;(?:;|{_BLANK})*\Z )
    | (?P<more>      ; )
    | (?P<unclear>   ['"$\\\0] | /\* )
    | (?P<percent>   % )
    """,
    _FLAGS,
)
_REFUSED = {
    "variable": "a parameter is written :'name'::type, after white space or a bracket; a colon has no other use",
    "more": "a file holds one statement",
    "unclear": "psql may read it as something else: a command, a name with $, a string or comment that has no end or "
    "is nested or continued",
}


class StatementError(Exception):
    """A .sql file that psql and psycopg would not read alike."""


@dataclass(frozen=True)
class Statement:
    """One .sql file, ready for psycopg: bytes, which is what psycopg takes where a text is not a literal in the code.

    ``rows`` is the file itself; ``row_json`` gives its only row as a JSON object (no row where it has none);
    ``rows_json`` gives its rows as one JSON array, in their order, and how many there are.
    """

    name: str
    parameters: frozenset[str]
    rows: bytes
    row_json: bytes
    rows_json: bytes


def parse(name: str, text: str) -> Statement:
    """Make a statement of a file's text.

    Raises:
        StatementError: it holds no statement, more than one, or what psql and psycopg would not read alike.

    """
    parameters: set[str] = set()
    statement = _HEAD.sub("", text, count=1)

    def replace(token: re.Match[str]) -> str:
        match token.lastgroup:
            case "parameter":
                parameters.add(token["parameter"])
                return f"%({token['parameter']})s"
            case "comment":
                return " "  # as to PostgreSQL: a/**/b is two words
            case "end":
                return ""
            case str(kind) if kind in _REFUSED:
                line = text.count("\n", 0, len(text) - len(statement) + token.start()) + 1
                raise StatementError(f"{name}.sql, line {line}: {token[0]}: {_REFUSED[kind]}")
            case _:
                return token[0].replace("%", "%%")

    rows = _TOKEN.sub(replace, statement).strip()
    if not rows:
        raise StatementError(f"{name}.sql holds no statement")
    wrapped = _as_row(name, rows)
    return Statement(
        name=name,
        parameters=frozenset(parameters),
        rows=rows.encode(),
        row_json=f"{wrapped} SELECT row_to_json(row) FROM row".encode(),
        rows_json=f"{wrapped} SELECT coalesce(json_agg(row), '[]'), count(*) FROM row".encode(),
    )


def _as_row(name: str, rows: str) -> str:
    """Make a statement the last part of a WITH.

    One that has a WITH of its own keeps that at the top, where PostgreSQL wants the parts that write.
    """
    if not rows.startswith("WITH"):
        return f"WITH row AS ({rows})"
    # sqlfluff keeps the parts indented: what stands at the left edge is the statement itself.
    parts, *statement = re.split(r"(?m)^(?=(?:SELECT|INSERT|UPDATE|DELETE)\b)", rows)
    if len(statement) != 1:
        raise StatementError(f"{name}.sql: after its WITH, one SELECT, INSERT, UPDATE or DELETE begins a line")
    return f"{parts.rstrip()}, row AS ({statement[0]})"


@functools.cache
def load(folder: Path = SQL) -> dict[str, Statement]:
    """Read every statement below a folder; ``tasks/list`` is the name of ``tasks/list.sql``.

    Raises:
        StatementError: the first file that ``parse`` refuses, or a folder without a statement.

    """
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.sql"))}
    found = {
        # As psql reads it: a byte order mark is skipped, and a carriage return in a string stays.
        name: parse(name, path.read_bytes().decode("utf-8-sig"))
        for name, path in files.items()
        if not name.startswith("migrations/")  # these are yoyo's
    }
    if not found:
        raise StatementError(f"{folder} holds no .sql file")
    return found
