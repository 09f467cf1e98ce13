"""The six calls under /api/tasks: HTTP only."""

import json
from typing import Any

from flask import Flask, Response, abort, request
from werkzeug.routing import BaseConverter

from todo_api import conditions, database, pages
from todo_api.blueprint import Blueprint
from todo_api.identity import current_user
from todo_api.json_body import MERGE_PATCH
from todo_api.openapi import INVALID_QUERY, Api, answers_with, documented
from todo_api.problems import MalformedRequest, VersionMismatch
from todo_api.schemas import EXAMPLE, LIST_LIMIT, NewTask, Task, TaskChanges, TaskQuery

KEY_LENGTH = 255
NO_SUCH_TASK = "No such task"
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


def _change(statement: str, task_id: int, **parameters: Any) -> Response:
    """Run a statement that changes a task under If-Match, and say why where it changes nothing."""
    while True:
        task = database.fetch_json(
            statement, user_id=current_user(), task_id=task_id, if_match=conditions.if_match(), **parameters
        )
        if task:
            return conditions.answer(task)
        now = None
        if conditions.has_if_match():
            now = database.fetch_json("tasks/get", user_id=current_user(), task_id=task_id)
        etag = conditions.etag_of(now or abort(404, NO_SUCH_TASK))
        # Between the two statements it may have come to a version that If-Match names: then that one is tried again.
        if not conditions.names(etag):
            raise VersionMismatch(etag)


@blueprint.route("")
@blueprint.arguments(TaskQuery(), location="query")
@blueprint.response(
    200, Task(many=True), example=[EXAMPLE], headers=answers_with("ETag of a list", "Link", "Cache-Control")
)
@documented(304, INVALID_QUERY, 413, 500, 503, takes=["If-None-Match"])
def list_tasks(query: dict[str, Any]) -> Response:
    """List tasks.

    Your tasks, newest first. Where there are more than `limit`, the `Link` header leads to the next page; follow it
    as it is. A page begins where the one before ended, whatever was created or deleted meanwhile.
    """
    limit = query.get("limit", LIST_LIMIT)
    tasks, count = database.fetch_json_list(
        "tasks/list",
        user_id=current_user(),
        limit=limit + 1,  # to see whether there is a next page
        completed=json.dumps(query["completed"]) if "completed" in query else "",
        q=query.get("q", ""),
        after=query.get("after", pages.FIRST),
    )
    page, cursor = pages.cut(tasks) if count > limit else (tasks, "")
    response = conditions.Answer(page, ETag=conditions.list_etag(page, cursor), Cache_Control=conditions.CACHE)
    if cursor:
        response.headers["Link"] = pages.next_link(request.path, request.args, cursor)
    return conditions.unless_known(response)


@blueprint.route("", methods=["POST"])
@blueprint.arguments(NewTask(), example={"title": "Buy milk"})
@blueprint.response(201, Task, example=EXAMPLE, headers=answers_with("Location", "ETag", "Cache-Control"))
@documented(400, 413, 415, 422, 500, 503, takes=["Idempotency-Key"])
def create_task(task: dict[str, Any]) -> Response:
    """Create a task.

    Only the title is required. What is stored is what was sent, code point for code point. With an `Idempotency-Key`
    the request can be sent again without creating another task.
    """
    key = request.headers.get("Idempotency-Key")
    if key is None:
        created = database.fetch_json("tasks/create", user_id=current_user(), task=json.dumps(task))
    elif 1 <= len(key) <= KEY_LENGTH:
        created = database.fetch_json(
            "tasks/create_once", user_id=current_user(), task=json.dumps(task), idempotency_key=key
        )
    else:
        raise MalformedRequest(f"Idempotency-Key must have 1 to {KEY_LENGTH} characters")
    created = created or abort(422)
    return conditions.answer(created, 201, Location=f"{request.path}/{conditions.number(created, 'id')}")


@blueprint.route("/<task_id:task_id>")
@blueprint.response(200, Task, example=EXAMPLE, headers=answers_with("ETag", "Cache-Control"))
@documented(304, 404, 413, 500, 503, takes=["If-None-Match"])
def get_task(task_id: int) -> Response:
    """Get a task.

    With the `ETag` of an earlier answer in `If-None-Match`, a task that has not changed since is a 304.
    """
    task = database.fetch_json("tasks/get", user_id=current_user(), task_id=task_id)
    return conditions.unless_known(conditions.answer(task or abort(404, NO_SUCH_TASK)))


@blueprint.route("/<task_id:task_id>", methods=["PATCH"])
@blueprint.arguments(TaskChanges(), example={"completed": True})
@blueprint.response(200, Task, example=EXAMPLE, headers=answers_with("ETag", "Cache-Control"))
@documented(
    *(400, 404, 412, 413, 415, 500, 503),
    takes=["If-Match"],
    requestBody={"content": {MERGE_PATCH: {"schema": TaskChanges, "example": {"description": None}}}},
)
def update_task(changes: dict[str, Any], task_id: int) -> Response:
    """Change a task.

    A JSON Merge Patch (RFC 7396): members that are absent stay as they are, `null` clears the description, and `{}`
    changes nothing.
    """
    return _change("tasks/update", task_id, changes=json.dumps(changes))


@blueprint.route("/<task_id:task_id>", methods=["DELETE"])
@blueprint.response(200, Task, example=EXAMPLE, headers=answers_with("ETag", "Cache-Control"))
@documented(404, 412, 413, 500, 503, takes=["If-Match"])
def delete_task(task_id: int) -> Response:
    """Delete a task.

    The answer is the task as it last was.
    """
    return _change("tasks/delete", task_id)


@blueprint.route("/<task_id:task_id>/toggle", methods=["POST"])
@blueprint.response(200, Task, example=EXAMPLE, headers=answers_with("ETag", "Cache-Control"))
@documented(404, 412, 413, 500, 503, takes=["If-Match"])
def toggle_task(task_id: int) -> Response:
    """Toggle a task.

    Flips `completed`; a body is not needed. Toggles at the same time all count.
    """
    return _change("tasks/toggle", task_id)
