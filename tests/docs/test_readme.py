"""The README is true: its commands run as they stand, in a fresh copy, in a folder with a space in its name."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

from tests.support.environment import ROOT
from tests.support.processes import free_port
from tests.support.service import Service
from todo_api.api import problems
from todo_api.config import Settings
from todo_api.embedded import cluster

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)]
RUN, TEST, *EXAMPLES = BLOCKS


def examples(word: str) -> list[str]:
    """Give the examples that begin with a word."""
    return [block for block in EXAMPLES if block.startswith(word)]


def copy_of_the_project(folder: Path) -> Path:
    """Copy the files that git knows, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return folder


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Path]]:
    """Run the README's first command in a copy of the project, with next to nothing in the environment."""
    folder = tmp_path_factory.mktemp("readme")
    project = copy_of_the_project(folder / "a clone")
    bare = ["env", "-i", f"PATH={os.environ['PATH']}", f"PORT={(port := free_port())}"]
    service = Service(folder / "log", ["sh", "-c", RUN], cwd=project, prefix=bare, PORT=port).wait()
    yield service, project
    service.client.close()
    (master,) = psutil.Process(service.process.pid).children()
    master.terminate()
    assert service.process.wait(timeout=60) == 0


def run(service: Service, project: Path, script: str) -> str:
    """Run a script in the project, and give what it prints; a command in it that fails fails the test."""
    database_url = f"postgresql://todo@/todo?host={quote(str(project / '.data' / 'postgres'), safe='')}"
    # The README's port is 8000, which may be taken on the machine that tests.
    done = subprocess.run(
        ["sh", "-e", "-c", script.replace("127.0.0.1:8000", f"127.0.0.1:{service.port}")],
        cwd=project,
        env={"PATH": f"{os.environ['PATH']}:{cluster.bin_folder()}", "DATABASE_URL": database_url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_screen_says_what_it_is_and_gives_the_two_commands() -> None:
    screen = "\n".join(README.splitlines()[:25])
    assert RUN in screen
    assert TEST in screen
    assert RUN.endswith("python wsgi.py")
    assert TEST.endswith("pytest")


def test_the_curl_examples_run_one_after_the_other(running: tuple[Service, Path]) -> None:
    variables, create, others, refused = [*examples("TASKS="), *examples("curl")]
    created = run(*running, f"{variables}\n{create}")
    assert created.startswith("HTTP/1.1 201 CREATED")
    assert "Location: /api/tasks/1" in created
    answers = run(*running, f"{variables}\n{others}").replace("}{", "}\n{").replace("]{", "]\n{").splitlines()
    assert len(answers) == 5
    assert answers[0].startswith("[{")
    assert all('"title":"Buy milk"' in answer for answer in answers)
    assert '"completed":true' in answers[-1]
    problem = run(*running, f"{variables}\n{refused}")
    shown = re.search(r"```json\n(.*?)```", README, re.DOTALL)
    assert shown
    assert json.loads(problem) == json.loads(shown[1])


def test_the_examples_of_pages_conditions_and_retries_show_what_the_readme_says(
    running: tuple[Service, Path],
) -> None:
    (variables,) = examples("TASKS=")
    (pages, retries) = examples("for ")
    (conditions,) = examples("TASK=")
    page = run(*running, f"{variables}\n{pages}")
    link = r'^Link: </api/tasks\?q=MILK&completed=false&limit=2&after=\d+_\d+>; rel="next"'
    assert re.search(link, page, re.MULTILINE)
    assert run(*running, f"{variables}\n{conditions}").split() == ["304", "200", "412"]
    first, again = run(*running, f"{variables}\n{retries}").splitlines()
    assert first == again
    assert first.startswith("201 /api/tasks/")


def test_the_psql_examples_run_beside_the_service(running: tuple[Service, Path]) -> None:
    (psql,) = examples("psql")
    assert "Buy milk" in run(*running, psql)
    (flask_psql,) = examples(".venv/bin/flask psql")
    printed = run(*running, flask_psql)
    assert "two litres" in printed
    assert "count" in printed
    (dump,) = examples(".venv/lib")
    run(*running, dump)
    assert "two litres" in (running[1] / "copy.sql").read_text(encoding="utf-8")


def test_the_example_with_origins_starts_a_service_that_lets_them_in(running: tuple[Service, Path]) -> None:
    (start,) = examples("CORS_ORIGINS=")
    service = Service(running[1] / "log", ["sh", "-c", f"exec env {start}"], cwd=running[1]).wait()
    answer = service.client.get("/api/tasks", headers={"Origin": "https://app.example.com"})
    assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example.com"
    assert service.stop() == 0


def test_the_example_with_a_url_starts_the_service() -> None:
    (start,) = examples("DATABASE_URL=")
    assert re.fullmatch(r"DATABASE_URL='postgresql://\S+' \.venv/bin/python wsgi\.py", start)


def test_the_tables_have_every_setting_and_every_problem() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    settings = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row.split("|")[1])}
    assert settings == {name.upper() for name in Settings.__dataclass_fields__}
    listed = {(int(status), kind) for status, kind in re.findall(r"^\| (\d+) \| `(\w+)` \|", README, re.MULTILINE)}
    known = {(status, kind) for status, (kind, _) in problems.KINDS.items()}
    assert listed == known | {(400, "validation_error")}


def test_every_file_that_is_named_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("https://")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_client_generator_is_the_one_that_the_tests_run() -> None:
    (npx,) = examples("npx")
    package = json.loads((ROOT / "tests" / "npm" / "package.json").read_text(encoding="utf-8"))
    assert f"openapi-typescript@{package['dependencies']['openapi-typescript']} " in npx


def test_the_check_runs_the_benchmarks_with_the_command_here() -> None:
    (command,) = examples(".venv/bin/pip")
    (pattern,) = re.findall(r"benchmark=.*grep -oE '([^']+)'", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert re.fullmatch(pattern, command)


def test_every_example_is_looked_at_by_a_test_here() -> None:
    known = (
        "TASKS=",
        "curl",
        "for ",
        "TASK=",
        "CORS_ORIGINS=",
        "npx",
        "psql",
        ".venv/bin/flask",
        ".venv/lib",
        ".venv/bin/pip",
    )
    assert [block for block in EXAMPLES if not block.startswith((*known, "DATABASE_URL="))] == []
