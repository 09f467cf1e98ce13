"""Linters and client generators run on the OpenAPI document of a running service."""

import importlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.optional_tools import SEARCH_PATH, npm_program
from tests.support.service import Service

OPERATIONS = ["create_task", "delete_task", "get_task", "list_tasks", "toggle_task", "update_task"]


@pytest.fixture(scope="module")
def document(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with the document that the service serves."""
    file = tmp_path_factory.mktemp("document") / "openapi.json"
    file.write_bytes(service.client.get("/openapi.json").content)
    return file


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a tool and check that it succeeds."""
    # Without these, Redocly sends usage data and looks for newer releases.
    offline = {"REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | offline | {"PATH": SEARCH_PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_spectral_finds_no_problem(document: Path) -> None:
    rules = document.with_name("spectral.json")
    rules.write_text('{"extends": "spectral:oas"}')
    done = run(
        npm_program("spectral"),
        "lint",
        "--quiet",
        "--format",
        "json",
        "--ruleset",
        rules,
        document.name,
        cwd=document.parent,
    )
    assert json.loads(done.stdout) == []


def test_redocly_finds_no_problem(document: Path) -> None:
    done = run(
        npm_program("redocly"),
        "lint",
        "--extends",
        "recommended",
        "--format",
        "json",
        document.name,
        cwd=document.parent,
    )
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["totals"] == {"errors": 0, "warnings": 0, "ignored": 0}


def test_openapi_typescript_generates_types_that_compile(document: Path) -> None:
    done = run(npm_program("openapi-typescript"), document.name, "--output", "api.ts", cwd=document.parent)
    assert "warn" not in (done.stdout + done.stderr).lower()
    types = document.with_name("api.ts")
    assert [name for name in OPERATIONS if f"    {name}: {{" in types.read_text()] == OPERATIONS
    run(npm_program("tsc"), "--noEmit", "--strict", types.name, cwd=document.parent)


@pytest.fixture(scope="module")
def generated(document: Path, service: Service) -> Iterator["Generated"]:
    """Return the client that openapi-python-client generates, connected to the service."""
    folder = document.with_name("generated_client")
    generator = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"]
    done = run(*generator, "--path", document, "--output-path", folder, cwd=document.parent)
    assert (done.stdout + done.stderr).strip() == f"Generating {folder}"  # and no warning
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder.parent)
        yield Generated(service.url)


class Generated:
    """The generated client: its calls and models by name, untyped, since it is generated while the tests run."""

    def __init__(self, url: str) -> None:
        """Create a client of the service."""
        self.client = importlib.import_module("generated_client").Client(base_url=url, raise_on_unexpected_status=True)
        self.models = importlib.import_module("generated_client.models")

    def call(self, operation: str, **arguments: Any) -> Any:
        """Make a call and return its response, with the status, the headers and the parsed body."""
        module = importlib.import_module(f"generated_client.api.tasks.{operation}")
        return module.sync_detailed(client=self.client, **arguments)


def test_the_generated_python_client_has_a_method_for_each_call(generated: Generated, document: Path) -> None:
    modules = document.parent.glob("generated_client/api/tasks/[!_]*.py")
    assert sorted(module.stem for module in modules) == OPERATIONS
    assert generated.models.Task


def test_the_generated_python_client_creates_lists_and_gets(generated: Generated) -> None:
    body, key = generated.models.NewTask(title="Buy milk", description=None), uuid.uuid4().hex
    created = generated.call("create_task", body=body, idempotency_key=key)
    assert (created.status_code, created.parsed.title, created.parsed.description) == (201, "Buy milk", None)
    assert generated.call("create_task", body=body, idempotency_key=key).parsed == created.parsed
    listed = generated.call("list_tasks", limit=1, completed=False, q="MILK")
    assert listed.parsed == [created.parsed]
    found = generated.call("get_task", task_id=created.parsed.id)
    assert found.parsed == created.parsed
    assert found.headers["ETag"] == '"1"'


def test_the_generated_python_client_updates_toggles_and_deletes(generated: Generated) -> None:
    task = generated.call("create_task", body=generated.models.NewTask(title="Buy milk")).parsed
    changes = generated.models.TaskChanges(description="two litres")
    updated = generated.call("update_task", task_id=task.id, body=changes, if_match='"1"').parsed
    assert (updated.title, updated.description, updated.version) == ("Buy milk", "two litres", 2)
    assert generated.call("toggle_task", task_id=task.id).parsed.completed is True
    deleted = generated.call("delete_task", task_id=task.id, if_match='"3"')
    assert (deleted.status_code, deleted.parsed.id, deleted.parsed.version) == (200, task.id, 3)


def test_the_generated_python_client_reads_problems(generated: Generated) -> None:
    task = generated.call("create_task", body=generated.models.NewTask(title="Buy milk")).parsed
    stale = generated.call("toggle_task", task_id=task.id, if_match='"7"')
    assert (stale.status_code, stale.parsed.type_) == (412, "precondition_failed")
    missing = generated.call("get_task", task_id=2**63 - 1).parsed
    assert (missing.type_, missing.status) == ("not_found", 404)
    rejected = generated.call("create_task", body=generated.models.NewTask(title="")).parsed
    assert [error.pointer for error in rejected.errors] == ["#/title"]
