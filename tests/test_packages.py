"""The rules for the packages, checked in the code: what each may import, and which module has SQL and problems."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.environment import ROOT

CODE = ROOT / "todo_api"
MODULES = sorted(CODE.rglob("*.py"))
TOP_LEVEL = {"todo_api", "sql", "tests", "wsgi.py", "requirements.txt", "README.md"}

# The modules of this project that each place may import. A place is a package or a module of todo_api.
PROJECT_IMPORTS = {
    "todo_api.config": set[str](),
    "todo_api.logs": set[str](),
    "todo_api.metrics": set[str](),
    "todo_api.draining": set[str](),
    "todo_api.database": {"todo_api.config", "todo_api.database"},
    "todo_api.embedded": {"todo_api.config", "todo_api.embedded"},
    "todo_api.tokens": {"todo_api.config", "todo_api.tokens"},
    "todo_api.api": {"todo_api.api", "todo_api.database", "todo_api.config", "todo_api.draining", "todo_api.tokens"},
    "todo_api.startup": {
        *("todo_api.config", "todo_api.database", "todo_api.embedded", "todo_api.logs", "todo_api.tokens"),
    },
    "todo_api.backup": {"todo_api.config", "todo_api.database", "todo_api.embedded", "todo_api.startup"},
    "todo_api.checks": {
        *("todo_api.config", "todo_api.database", "todo_api.embedded", "todo_api.startup", "todo_api.tokens"),
    },
    "todo_api.commands": {
        *(
            "todo_api.backup",
            "todo_api.checks",
            "todo_api.config",
            "todo_api.database",
            "todo_api.embedded",
            "todo_api.startup",
        ),
    },
    "todo_api": {
        *("todo_api.api", "todo_api.commands", "todo_api.config", "todo_api.database", "todo_api.metrics"),
        *("todo_api.startup", "todo_api.tokens"),
    },
    "todo_api.server": {
        *("todo_api.api", "todo_api.config", "todo_api.database", "todo_api.draining", "todo_api.logs"),
        *("todo_api.metrics", "todo_api.server", "todo_api.startup", "todo_api.tokens"),
    },
}
# The only places that may import each library.
LIBRARIES = {
    "flask": {"todo_api", "todo_api.api", "todo_api.commands"},
    "flask_cors": {"todo_api.api"},
    "flask_smorest": {"todo_api.api"},
    "werkzeug": {"todo_api.api"},
    "marshmallow": {"todo_api.api"},
    "webargs": {"todo_api.api"},
    "apispec": {"todo_api.api"},
    "gunicorn": {"todo_api.server"},
    "prometheus_client": {"todo_api.server"},
    "psycopg": {"todo_api.database", "todo_api.embedded"},
    "psycopg_pool": {"todo_api.database"},
    "yoyo": {"todo_api.database"},
    "jwt": {"todo_api.tokens"},
    "psutil": {"todo_api.embedded"},
    "environs": {"todo_api.config"},
    "dotenv": {"todo_api.config"},
    "subprocess": {"todo_api.backup", "todo_api.commands", "todo_api.embedded"},
}
SQL_WORDS = re.compile(r"\b(SELECT|INSERT INTO|UPDATE|DELETE FROM|CREATE TABLE|ALTER|DROP|BEGIN|COMMIT)\b")


def name_of(module: Path) -> str:
    """Return the dotted name of a module."""
    parts = module.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def place_of(name: str) -> str:
    """Return the place of a module: its package, or the module itself if that is directly in todo_api."""
    return ".".join(name.split(".")[:2])


def syntax_tree(module: Path) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(module.read_text(encoding="utf-8"))


def imported_names(module: Path) -> set[str]:
    """Return the names of all modules that a module imports, including imports in functions."""
    found = set()
    for node in ast.walk(syntax_tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in names if name in map(name_of, MODULES)}
            found |= submodules
            if len(submodules) < len(names):
                found.add(node.module)
    return found


def string_constants(module: Path) -> list[str]:
    """Return the string constants of a module, without its docstrings."""
    tree = syntax_tree(module)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in found if text not in docstrings]


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_a_module_imports_only_what_its_place_may_import(module: Path) -> None:
    imported = {place_of(name) for name in imported_names(module) if name.split(".")[0] == "todo_api"}
    assert imported - PROJECT_IMPORTS[place_of(name_of(module))] == set()


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_only_in_its_places(library: str) -> None:
    importing = {
        place_of(name_of(module))
        for module in MODULES
        if library in {name.split(".")[0] for name in imported_names(module)}
    }
    assert importing == LIBRARIES[library]


@pytest.mark.parametrize("package", ["todo_api.database", "todo_api.tokens"])
def test_other_packages_do_not_import_the_modules_of_a_package(package: str) -> None:
    for module in MODULES:
        if place_of(name_of(module)) != package:
            assert not [name for name in imported_names(module) if name.startswith(f"{package}.")], module


def test_only_config_reads_the_environment() -> None:
    readers = {
        name_of(module)
        for module in MODULES
        if re.search(r"\bos\.environ|from os import|getenv", code_without_comments(module))
    }
    assert readers == {"todo_api.config"}


def code_without_comments(module: Path) -> str:
    """Return the code of a module without its comments."""
    return ast.unparse(syntax_tree(module))


def test_only_the_loader_opens_sql_files_and_contains_sql() -> None:
    loader = {"todo_api.database.statements"}
    assert {
        name_of(module) for module in MODULES if any("*.sql" in text for text in string_constants(module))
    } == loader
    assert {name_of(module) for module in MODULES if any(map(SQL_WORDS.search, string_constants(module)))} == loader


@pytest.mark.parametrize("name", ["tasks", "health", "docs"])
def test_routes_contain_no_try(name: str) -> None:
    assert not [node for node in ast.walk(syntax_tree(CODE / "api" / f"{name}.py")) if isinstance(node, ast.Try)]


def test_schemas_import_only_marshmallow() -> None:
    assert imported_names(CODE / "api" / "schemas.py") <= {"marshmallow", "re", "typing"}


def test_only_problems_writes_the_body_of_a_failure() -> None:
    writers = {name_of(module) for module in MODULES if "application/problem+json" in string_constants(module)}
    assert writers == {"todo_api.api.problems"}


def test_only_schemas_and_pages_name_the_times_of_a_task() -> None:
    modules_by_column = {
        column: {name_of(module) for module in MODULES if column in string_constants(module)}
        for column in ("created_at", "updated_at")
    }
    # A cursor contains created_at and id.
    assert modules_by_column == {
        "created_at": {"todo_api.api.schemas", "todo_api.api.pages"},
        "updated_at": {"todo_api.api.schemas"},
    }


def test_every_statement_is_called_by_the_name_of_its_file() -> None:
    constants = {text for module in MODULES for text in string_constants(module)}
    statements = {f"{path.parent.name}/{path.stem}" for path in (ROOT / "sql").glob("[!m]*/*.sql")}
    assert len(statements) > 6
    assert statements - constants == set()


def test_every_module_has_a_docstring() -> None:
    assert [module for module in MODULES if not ast.get_docstring(syntax_tree(module))] == []


def test_the_top_level_has_only_the_expected_files_and_folders() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    visible = {path.split("/")[0] for path in listed.stdout.splitlines() if not path.startswith(".")}
    assert visible == TOP_LEVEL
