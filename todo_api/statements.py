"""Turns the files in sql/, which psql runs unchanged, into statements for psycopg.

A file holds one statement. ``:'name'::type`` in it is psql's quoted variable; here it becomes a bound parameter, never
text. Lines that start with a backslash give psql its defaults and are left out. Everything else that psql would replace
(``:name``, ``:"name"``) is refused when the file is loaded, not when somebody calls it.
"""

import re
from dataclasses import dataclass
from pathlib import Path

SQL = Path(__file__).resolve().parent.parent / "sql"
MIGRATIONS = SQL / "migrations"

_TOKEN = re.compile(
    r"""
      (?P<comment>   --[^\n]* | /\*.*?\*/ )
    | (?P<quoted>    [eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*" | (?P<tag>\$\w*\$).*?(?P=tag) )
    | :'(?P<parameter>[a-z_][a-z0-9_]*)'(?=::[a-z])
    | (?P<cast>      :: )
    | (?P<variable>  :['"{]?\w* )
    | (?P<end>       ; )
    | (?P<percent>   % )
    """,
    re.VERBOSE | re.DOTALL,
)
_END = "\0"  # stands for the semicolon; no SQL text can hold it


class StatementError(Exception):
    """A .sql file that psql and psycopg would not read alike."""


@dataclass(frozen=True)
class Statement:
    """One .sql file, ready for psycopg: bytes, which is what psycopg takes where a text is not a literal in the code.

    ``rows`` is the file itself; ``row_json`` gives its only row as a JSON object (no row where it has none);
    ``rows_json`` gives its rows as one JSON array, in their order.
    """

    name: str
    parameters: frozenset[str]
    rows: bytes
    row_json: bytes
    rows_json: bytes


def parse(name: str, text: str) -> Statement:
    """Make a statement of a file's text.

    Raises:
        StatementError: it holds no statement, more than one, or a psql variable not written ``:'name'::type``.

    """
    parameters: set[str] = set()
    # Emptied, not removed: the line numbers in messages stay those of the file.
    sql = re.sub(r"(?m)^\\.*$", "", text)

    def replace(token: re.Match[str]) -> str:
        match token.lastgroup:
            case "parameter":
                parameters.add(token["parameter"])
                return f"%({token['parameter']})s"
            case "variable":
                line = sql.count("\n", 0, token.start()) + 1
                raise StatementError(f"{name}.sql, line {line}: {token[0]} must be written as :'name'::type")
            case "comment":
                return ""
            case "end":
                return _END
            case _:
                return token[0].replace("%", "%%")

    rows, *rest = (part.strip() for part in _TOKEN.sub(replace, sql).split(_END))
    if not rows:
        raise StatementError(f"{name}.sql holds no statement")
    if any(rest):
        raise StatementError(f"{name}.sql holds more than one statement")
    return Statement(
        name=name,
        parameters=frozenset(parameters),
        rows=rows.encode(),
        row_json=f"WITH row AS ({rows}) SELECT row_to_json(row) FROM row".encode(),
        rows_json=f"WITH row AS ({rows}) SELECT coalesce(json_agg(row), '[]') FROM row".encode(),
    )


def load(folder: Path = SQL) -> dict[str, Statement]:
    """Read every statement below a folder; ``tasks/list`` is the name of ``tasks/list.sql``.

    Raises:
        StatementError: the first file that ``parse`` refuses, or a folder without a statement.

    """
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.sql"))}
    found = {
        name: parse(name, path.read_text(encoding="utf-8"))
        for name, path in files.items()
        if not name.startswith("migrations/")  # these are yoyo's
    }
    if not found:
        raise StatementError(f"{folder} holds no .sql file")
    return found
