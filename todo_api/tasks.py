"""The six calls under /api/tasks: HTTP only."""

import json
from typing import Any

from flask import Flask, Response, abort, url_for
from werkzeug.routing import BaseConverter

from todo_api import database
from todo_api.docs import Api, Blueprint, documented
from todo_api.identity import current_user
from todo_api.json_body import MERGE_PATCH
from todo_api.schemas import EXAMPLE, NewTask, Task, TaskChanges, TaskQuery

LIST_LIMIT = 10_000
NO_SUCH_TASK = "No such task"
_LOCATION = {"description": "Where the task is.", "schema": {"type": "string", "format": "uri-reference"}}
_CHANGES = {"schema": TaskChanges, "example": {"description": None}}
_LARGEST_ID = 2**63 - 1  # PostgreSQL's bigint

blueprint = Blueprint("tasks", __name__, url_prefix="/api/tasks", description="Things to do.")


class TaskId(BaseConverter):
    """A positive 64-bit integer in ASCII digits; any other path is a 404, and never reaches the database."""

    regex = "[1-9][0-9]{0,18}"

    def to_python(self, value: str) -> int:
        """Refuse what no bigint holds."""
        # A ValidationError would let werkzeug go on to other methods' rules, and end in a 405.
        return task_id if (task_id := int(value)) <= _LARGEST_ID else abort(404, NO_SUCH_TASK)


def init_app(app: Flask, api: Api) -> None:
    """Register the calls, and the paths' ids."""
    app.url_map.converters["task_id"] = TaskId
    api.register_converter(TaskId, lambda _: {"type": "integer", "format": "int64", "minimum": 1})
    api.register_blueprint(blueprint)


def _one(task: bytes | None, status: int = 200) -> Response:
    return Response(task or abort(404, NO_SUCH_TASK), status, mimetype="application/json")


@blueprint.route("")
@blueprint.arguments(TaskQuery, location="query")
@blueprint.response(200, Task(many=True), example=[EXAMPLE])
@documented(400, 500, 503)
def list_tasks(_query: dict[str, Any]) -> Response:
    """List tasks.

    Your tasks, newest first, at most 10 000 of them. No tasks is an empty array.
    """
    tasks = database.fetch_json_list("tasks/list", user_id=current_user(), limit=LIST_LIMIT)
    return Response(tasks, mimetype="application/json")


@blueprint.route("", methods=["POST"])
@blueprint.arguments(NewTask, example={"title": "Buy milk"})
@blueprint.response(201, Task, example=EXAMPLE, headers={"Location": _LOCATION})
@documented(400, 413, 415, 500, 503)
def create_task(task: dict[str, Any]) -> Response:
    """Create a task.

    Only the title is required. What is stored is what was sent, code point for code point.
    """
    created = _one(database.fetch_json("tasks/create", user_id=current_user(), task=json.dumps(task)), 201)
    created.location = url_for("tasks.get_task", task_id=json.loads(created.data)["id"])
    return created


@blueprint.route("/<task_id:task_id>")
@blueprint.response(200, Task, example=EXAMPLE)
@documented(404, 500, 503)
def get_task(task_id: int) -> Response:
    """Get a task."""
    return _one(database.fetch_json("tasks/get", user_id=current_user(), task_id=task_id))


@blueprint.route("/<task_id:task_id>", methods=["PATCH"])
@blueprint.arguments(TaskChanges, example={"completed": True})
@blueprint.response(200, Task, example=EXAMPLE)
@documented(400, 404, 413, 415, 500, 503, requestBody={"content": {MERGE_PATCH: _CHANGES}})
def update_task(changes: dict[str, Any], task_id: int) -> Response:
    """Change a task.

    A JSON Merge Patch (RFC 7396): members that are absent stay as they are, `null` clears the description, and `{}`
    changes nothing.
    """
    changed = database.fetch_json("tasks/update", user_id=current_user(), task_id=task_id, changes=json.dumps(changes))
    return _one(changed)


@blueprint.route("/<task_id:task_id>", methods=["DELETE"])
@blueprint.response(200, Task, example=EXAMPLE)
@documented(404, 500, 503)
def delete_task(task_id: int) -> Response:
    """Delete a task.

    The answer is the task as it last was.
    """
    return _one(database.fetch_json("tasks/delete", user_id=current_user(), task_id=task_id))


@blueprint.route("/<task_id:task_id>/toggle", methods=["POST"])
@blueprint.response(200, Task, example=EXAMPLE)
@documented(404, 500, 503)
def toggle_task(task_id: int) -> Response:
    """Toggle a task.

    Flips `completed`; a body is not needed. Toggles at the same time all count.
    """
    return _one(database.fetch_json("tasks/toggle", user_id=current_user(), task_id=task_id))
