"""The house's rules, read from the code: which room may touch what, and that the pieces stay small."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.environment import ROOT

MODULES = sorted((ROOT / "todo_api").glob("*.py"))
TOP_LEVEL = {"todo_api", "sql", "tests", "wsgi.py", "requirements.txt", "README.md"}

MAY_IMPORT = {
    "psycopg_pool": {"database"},
    "psycopg": {"connection", "database", "database_url", "problems", "migrations", "embedded"},
    "yoyo": {"migrations"},
    "psutil": {"cluster"},
    "environs": {"config"},
    "subprocess": {"cluster", "commands", "embedded"},
}
SQL_WORDS = re.compile(r"\b(SELECT|INSERT INTO|UPDATE|DELETE FROM|CREATE TABLE|ALTER|DROP|BEGIN|COMMIT)\b")


def tree(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


def imports(module: Path) -> set[str]:
    """Give the top-level packages that a module imports."""
    nodes = list(ast.walk(tree(module)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def strings(module: Path) -> list[str]:
    """Give a module's strings, without its docstrings."""
    code = tree(module)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(code) if isinstance(node, documented)}
    found = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in found if text not in docstrings]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_only_its_rooms_import_a_package(package: str) -> None:
    assert {module.stem for module in MODULES if package in imports(module)} <= MAY_IMPORT[package]


def test_only_config_reads_the_environment() -> None:
    readers = {module.stem for module in MODULES if re.search(r"\bos\.environ|from os import|getenv", code(module))}
    assert readers == {"config"}


def code(module: Path) -> str:
    """Give a module's code without comments and docstrings."""
    return ast.unparse(tree(module))


def test_only_statements_opens_sql_files_and_holds_sql() -> None:
    opens = {module.stem for module in MODULES if any(".sql" in text and "*" in text for text in strings(module))}
    assert opens == {"statements"}
    assert {module.stem for module in MODULES if any(SQL_WORDS.search(text) for text in strings(module))} == {
        "statements"
    }


def test_blueprints_hold_no_sql_no_psycopg_and_no_try() -> None:
    for name in ("tasks", "health"):
        module = ROOT / "todo_api" / f"{name}.py"
        assert not imports(module) & {"psycopg", "psycopg_pool"}
        assert not [node for node in ast.walk(tree(module)) if isinstance(node, ast.Try)]


def test_schemas_import_marshmallow_alone() -> None:
    assert imports(ROOT / "todo_api" / "schemas.py") <= {"marshmallow", "re", "typing"}


def test_only_problems_writes_a_failures_body() -> None:
    writers = {module.stem for module in MODULES if "application/problem+json" in strings(module)}
    assert writers == {"problems"}


def test_only_sql_knows_the_columns_that_no_client_sends() -> None:
    knowing = {
        column: {module.stem for module in MODULES if column in strings(module)}
        for column in ("created_at", "updated_at")
    }
    # A cursor is made of created_at and id.
    assert knowing == {"created_at": {"schemas", "pages"}, "updated_at": {"schemas"}}


def test_every_statement_is_called_by_its_files_name() -> None:
    called = {text for module in MODULES for text in strings(module)}
    called |= {f"database/{text}" for text in strings(ROOT / "todo_api" / "migrations.py")}
    files = {f"{path.parent.name}/{path.stem}" for path in (ROOT / "sql").glob("[!m]*/*.sql")}
    assert len(files) > 6
    assert files - called == set()


def test_every_file_says_what_it_is_for_and_is_short() -> None:
    for module in MODULES:
        assert ast.get_docstring(tree(module)), module
        lines = module.read_text(encoding="utf-8").count("\n")
        assert lines <= 220, (module, lines)


def test_the_visible_top_level_is_what_the_house_says() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    visible = {path.split("/")[0] for path in listed.stdout.splitlines() if not path.startswith(".")}
    assert visible == TOP_LEVEL
