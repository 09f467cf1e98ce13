"""The measured operations, as HTTP calls and as statements for pgbench."""

import re
from dataclasses import dataclass

from todo_api.api import pages
from todo_api.database import statements


@dataclass(frozen=True)
class Operation:
    """A call that a load repeats."""

    name: str
    method: str
    path: str  # {id} stands for a random id of a task
    body: str = ""  # {n} stands for another number in each request
    statement: str = ""
    one: bool = True  # whether the response is one task


TASKS = "/api/tasks"
ALL = Operation("list of 10 000", "GET", TASKS, statement="tasks/list", one=False)
READ = Operation("read", "GET", f"{TASKS}/{{id}}", statement="tasks/get")
CREATE = Operation("create", "POST", TASKS, '{"title": "Buy milk {n}"}', "tasks/create")
PATCH = Operation("patch", "PATCH", f"{TASKS}/{{id}}", '{"title": "Buy bread {n}"}', "tasks/update")
TOGGLE = Operation("toggle", "POST", f"{TASKS}/{{id}}/toggle", statement="tasks/toggle")


def page(name: str, cursor: str = "", filters: str = "") -> Operation:
    """Return the operation that gets a page of 50."""
    after = f"&after={cursor}" if cursor else ""
    return Operation(
        f"page of 50, {name}", "GET", f"{TASKS}?limit=50{after}{filters}", statement="tasks/list", one=False
    )


def for_pgbench(operation: Operation) -> tuple[str, dict[str, str]]:
    """Return the service's statement for an operation as a pgbench script, and the script's variables."""
    statement = statements.load()[operation.statement]
    sql = (statement.row_json if operation.one else statement.rows_json).decode()
    query = dict(pair.split("=") for pair in operation.path.partition("?")[2].split("&") if pair)
    variables = {
        "user_id": "local",
        "limit": str(int(query.get("limit", "10000")) + 1),
        "after": query.get("after", pages.FIRST_CURSOR),
        "completed": query.get("completed", ""),
        "q": query.get("q", ""),
        "task": operation.body,
        "changes": operation.body,
        "if_match": "{}",
    }

    def in_pgbench(parameter: re.Match[str]) -> str:
        name = statement.parameters[int(parameter[1]) - 1]
        value = variables.get(name, ":")
        if "{n}" in value:
            before, after = value.split("{n}")
            return f"('{before}' || :n::text || '{after}')"
        # pgbench does not support empty variables. A literal gives PostgreSQL a small advantage.
        return f":{name}" if value else "''"

    script = re.sub(r"\$(\d+)", in_pgbench, sql)
    used = {name: value for name, value in variables.items() if value and name in statement.parameters}
    return script, {name: value for name, value in used.items() if "{n}" not in value}
