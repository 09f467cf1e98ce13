"""The loader of sql/: it reads each file as psql does, or rejects the file."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import TupleRow

from tests.support.environment import ROOT, environment
from tests.support.psql import PSQLS
from todo_api.database import statements
from todo_api.database.statements import Statement, StatementError, parse

INJECTION = "'; DROP TABLE tasks; --"


@pytest.fixture
def connection(conninfo: str) -> Iterator[psycopg.Connection[TupleRow]]:
    """Return a connection to the tests' database, in autocommit mode as in the pool."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        yield connection


def loaded_sql(text: str) -> str:
    """Return the SQL that the loader makes of a file with this text."""
    return parse("tasks/some", text).rows.decode()


def error_message(text: str) -> str:
    """Return the message with which the loader rejects a file with this text."""
    with pytest.raises(StatementError) as raised:
        parse("tasks/some", text)
    return str(raised.value)


def execute(
    connection: psycopg.Connection[TupleRow], statement: Statement, query: str = "rows", **parameters: object
) -> list[TupleRow]:
    """Run a statement, or the query of it that returns JSON, and return its rows."""
    values = [value.decode() for value in statement.values(parameters)]
    return psycopg.RawCursor(connection).execute(getattr(statement, query), values).fetchall()


def test_a_quoted_variable_with_a_cast_becomes_a_bound_parameter() -> None:
    statement = parse("tasks/some", "SELECT :'task_id'::bigint, :'q'::text, (:'q'::text), ARRAY[:'q'::text];")
    assert statement.rows == b"SELECT $1::bigint, $2::text, ($2::text), ARRAY[$2::text]"
    assert statement.parameters == ("task_id", "q")


@pytest.mark.parametrize(
    "variable",
    [
        ":name",
        ":1",
        ":NAME::text",
        ':"name"',
        ':"name"::text',
        ":{?name}",
        ":'name'",
        ":'name' ::text",
        ":'Name'::text",
        ":'1'::text",
        ":'name'::\"char\"",
        "1:::'name'::text",
        "1::int:name",
        "(ARRAY[1, 2])[1:2]",
        ": name",
        ":=",
        ":'näme'::text",
        ":é",
        # psql inserts a quoted literal here. With the characters before it, it would be another literal.
        "E:'name'::text",
        "U&:'name'::text",
        "'a':'name'::text",
        "1:'name'::text",
    ],
)
def test_any_other_variable_is_rejected_with_its_file_and_line(variable: str) -> None:
    text = f"-- What it does.\n\\set x 1\n\nSELECT\n    1,\n    {variable};\n"
    assert error_message(text).startswith("tasks/some.sql, line 6: :")


@pytest.mark.parametrize(
    "literal",
    [
        "':a :\"b\" ; % :''c''::text -- \\d'",
        "E':a ; \\' :b ; '' \\\\'",
        "e'\\\\'",
        '":a ; "" :b -- /* \'"',
        "$$ :a ; ' :'b'::text -- $$",
        "$tag$ :a ; $$ $other$ $tagg$ ' $tag$",
        "$_1$ $ $_1$",
        "U&':a ; \\0041 '' \\'",
        'U&":a ; \\0041"',
        "B'01'",
        "'\n\\if :a\n'",
        "$$\n\\echo :a\n$$",
        "'a\r\nb'",
        "'C:\\'",
        "date'C:\\', ':a ; --'",
    ],
)
def test_quoted_text_stays_unchanged(literal: str) -> None:
    assert loaded_sql(f"SELECT {literal};\n") == f"SELECT {literal}"


@pytest.mark.parametrize(
    "comment",
    ["-- :a ; ' \" % $$ \\d\n", "/* :a ; ' \" % $$ \\d -- */", "/**/", "/*/ :a */", "/*\n\\if :a\n*/", "-- a\r"],
)
def test_comments_are_removed(comment: str) -> None:
    assert loaded_sql(f"SELECT 1 + {comment} 2;").split() == ["SELECT", "1", "+", "2"]


def test_a_comment_separates_words() -> None:
    assert loaded_sql("SELECT/**/1-/**/-1") == "SELECT 1- -1"


def test_casts_stay_unchanged() -> None:
    assert loaded_sql("SELECT a::int, '1'::int::text, b::'c'") == "SELECT a::int, '1'::int::text, b::'c'"


def test_percent_signs_stay_as_they_are(connection: psycopg.Connection[TupleRow]) -> None:
    statement = parse("tasks/some", "SELECT 7 % 4, '%s %(a)s', $$%$$, :'a'::text LIKE 'x%'")
    assert execute(connection, statement, a="xyz") == [(3, "%s %(a)s", "%", True)]


@pytest.mark.parametrize(
    "head",
    [
        "\\if :{?limit} \\else \\set limit 50 \\endif\n",
        "\\if :{?limit}\n\\else\n\\set limit 50\n\\endif\n",
        "-- What it does.\n\n\\set QUIET on\n/* and\nhow */\n\\pset null -\n",
        "\\if :{?limit} \\else \\set limit 50 \\endif\r\n",
    ],
)
def test_psql_commands_before_the_statement_are_removed(head: str) -> None:
    assert loaded_sql(f"{head}SELECT 1;\n") == "SELECT 1"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("SELECT 1 \\gset\n", 1),
        ("SELECT 1\n\\g\n", 2),
        ("SELECT 1\n\\if :{?a}\n+ 1\n\\endif\n;", 2),
        ("SELECT 1;\n\\echo done\n", 1),
        ("SELECT 1 \\; SELECT 2;", 1),
        ("SELECT 1 \\:a;", 1),
        (" \\set a 1\nSELECT 1;", 1),
        ("/* */ \\set a 1\nSELECT 1;", 1),
        ("\\set a 1 \\\\ DELETE FROM tasks;\nSELECT 1;", 1),
        ("\\\\ DELETE FROM tasks;\nSELECT 1;", 1),
    ],
)
def test_a_backslash_that_psql_reads_elsewhere_is_rejected(text: str, line: int) -> None:
    assert error_message(text).startswith(f"tasks/some.sql, line {line}: ")


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1; SELECT 2",
        "SELECT 1;\nSELECT 2;",
        "SELECT 1; /* a */ -- b\n SELECT 2",
        "SELECT (1; 2)",
        "CREATE FUNCTION one() RETURNS int BEGIN ATOMIC SELECT 1; END;",
    ],
)
def test_a_file_with_two_statements_is_rejected(text: str) -> None:
    assert error_message(text) == "tasks/some.sql, line 1: ;: a file holds one statement"


@pytest.mark.parametrize("text", ["", "\n \n", "-- only a comment", "/* only a comment */", ";", "\\set a 1\n"])
def test_a_file_without_a_statement_is_rejected(text: str) -> None:
    assert error_message(text) == "tasks/some.sql has no statement"


@pytest.mark.parametrize(
    "text",
    [
        "SELECT ';'",
        'SELECT 1 AS ";";',
        "SELECT 1 -- ;\n;",
        "SELECT $$;$$",
        "SELECT /* ; */ 1;;\n;",
        "SELECT 1; -- ; :a\n",
    ],
)
def test_a_semicolon_in_a_string_or_a_comment_does_not_end_the_statement(
    text: str, connection: psycopg.Connection[TupleRow]
) -> None:
    assert len(execute(connection, parse("tasks/some", text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 'no end",
        "SELECT 'a''b",
        'SELECT "no end',
        "SELECT $$no end",
        "SELECT $a$no end$b$",
        "SELECT E'no end\\'",
        "SELECT /* no end",
        "SELECT 1 /* /* nested */ ; */",
        "/* /* nested */ */ SELECT 1",
        "SELECT E'continued'\n'in a \\' second'",
        "SELECT E'continued' -- behind a comment\n'in a \\' second'",
        "SELECT E'continued'\n'that\\'s -- no comment'",
        # A $ in an identifier does not start a quoted text, and neither does a $ before a digit.
        "SELECT 1 AS a$1$b$1$",
        "SELECT 1 AS a$$",
        "SELECT $1$ :a $1$",
        # psycopg would pass $1 to PostgreSQL, which reads it as the first parameter.
        "SELECT $1::text, :'a'::text",
        "SELECT 1\0; DELETE FROM tasks",
    ],
)
def test_a_file_that_psql_may_read_differently_is_rejected(text: str) -> None:
    assert "psql may read this differently" in error_message(text)


@pytest.mark.parametrize("psql", PSQLS)
@pytest.mark.parametrize(
    "text",
    [
        "SELECT :'a'::text, ':a', E':a\\' ; :a', \":a\" FROM (SELECT 1 AS \":a\") AS t;",
        "SELECT date'2026-01-11'::text, $$:a ; '$$, $b$:'a'::text$b$, U&'\\0041 :a', B'01'::text, X'1F'::text;",
        "SELECT 1/**/AS one, 2 */* :a */ 3, 7 % 4, 5--1\n- 1, '-- :a', '/* :a', '%';",
        "SELECT '\n\\if :a\n', (ARRAY[:'a'::text])[1], ('{1}'::int[])[1]::text",
        "\\if :{?a} \\else \\set a 1 \\endif\r\n-- :b\r\nSELECT\r\n:'a'::text, 'a\r\nb' = E'a\\r\\nb';\r\n",
        "\ufeffSELECT :'a'::text;",
        "SELECT 'a'\n' :b', E'\\\\', 'C:\\', $a$ $b$a$, $$ $a$$;",
        "SELECT :'a'::text, /* -- */ 'x' -- /*\n, /*/ ' */ 'y' /***/;;\n-- end",
    ],
)
def test_the_loader_and_psql_read_a_file_in_the_same_way(psql: str, text: str, tmp_path: Path, conninfo: str) -> None:
    file = tmp_path / "some.sql"
    file.write_bytes(text.encode())
    statement = statements.load(tmp_path)["some"]
    value = "x'y\\z :b"
    with psycopg.connect(conninfo) as connection:
        [row] = execute(connection, statement, a=value)
    command = [
        psql,
        "-X",
        "-v",
        "ON_ERROR_STOP=1",
        "-v",
        f"a={value}",
        "-qAt0",
        "-F",
        "\x1f",
        "-f",
        str(file),
        conninfo,
    ]
    psql_result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, check=True)
    assert psql_result.stdout.decode().rstrip("\0\n").split("\x1f") == [psql_text(value) for value in row]


def psql_text(value: object) -> str:
    """Return the text that psql prints for a value."""
    return {True: "t", False: "f"}.get(value, "") if isinstance(value, bool) else str(value)


def test_a_value_never_becomes_sql(connection: psycopg.Connection[TupleRow]) -> None:
    statement = parse("tasks/some", "SELECT :'a'::text AS a, length(:'a'::text) AS length;")
    assert execute(connection, statement, a=INJECTION) == [(INJECTION, len(INJECTION))]
    [(json,)] = execute(connection, statement, "row_json", a=INJECTION)
    assert json == {"a": INJECTION, "length": len(INJECTION)}


def test_rows_are_returned_as_json_objects_or_arrays(connection: psycopg.Connection[TupleRow]) -> None:
    statement = parse("tasks/some", "SELECT n FROM generate_series(1, :'n'::int) AS n ORDER BY n DESC -- last\n;")
    assert execute(connection, statement, "row_json", n=1) == [({"n": 1},)]
    assert execute(connection, statement, "row_json", n=0) == []
    assert execute(connection, statement, "rows_json", n=2) == [([{"n": 2}, {"n": 1}], 2)]
    assert execute(connection, statement, "rows_json", n=0) == []
    arrays = execute(connection, statement, "rows_json", n=8001)
    assert [(len(array), number) for array, number in arrays] == [(4000, 4000), (4000, 4000), (1, 1)]
    assert [row["n"] for array, _ in arrays for row in array] == list(range(8001, 0, -1))
    array = connection.pgconn.exec_params(statement.rows_json, [b"2"]).get_value(0, 0)
    assert array == b'[{"n":2}' + statements.SEPARATOR + b'{"n":1}]'


def test_every_file_of_the_project_is_loaded_under_its_name() -> None:
    loaded = statements.load()
    files = {path.relative_to(statements.SQL).with_suffix("").as_posix() for path in statements.SQL.glob("[td]*/*.sql")}
    assert set(loaded) == files
    assert {f"tasks/{name}" for name in ("create", "delete", "get", "list", "toggle", "update")} <= files
    assert {name: "user_id" in loaded[name].parameters for name in files} == {
        name: name.startswith("tasks/") or name in {"database/clear_abandoned_keys", "database/identify"}
        for name in files
    }


@pytest.mark.parametrize("folder", ["migrations", "citus"])
def test_files_for_yoyo_and_for_psql_only_are_not_loaded(folder: str, tmp_path: Path) -> None:
    for name in ("tasks", folder):
        (tmp_path / name).mkdir()
    (tmp_path / "tasks" / "good.sql").write_text("SELECT 1;\n", encoding="utf-8")
    (tmp_path / folder / "several.sql").write_text("SELECT 1;\nSELECT :a;\n", encoding="utf-8")
    assert set(statements.load(tmp_path)) == {"tasks/good"}


def test_an_invalid_file_stops_the_loader(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "good.sql").write_text("SELECT 1;\n", encoding="utf-8")
    (tmp_path / "tasks" / "wrong.sql").write_text("SELECT\n:a;\n", encoding="utf-8")
    with pytest.raises(StatementError, match=r"^tasks/wrong\.sql, line 2: :a: "):
        statements.load(tmp_path)


def test_a_folder_without_sql_files_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(StatementError, match=r"has no \.sql file"):
        statements.load(tmp_path)
    with pytest.raises(StatementError, match=r"has no \.sql file"):
        statements.load(tmp_path / "missing")


def test_loading_stops_at_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "latin.sql").write_bytes(b"SELECT 'caf\xe9'")
    with pytest.raises(StatementError, match=r"^latin\.sql is not UTF-8: "):
        statements.load(tmp_path)
