"""The six calls under /api/tasks."""

import json
from typing import Any

from flask import Flask, Response, abort, request
from werkzeug.routing import BaseConverter

from todo_api.api import conditions, pages
from todo_api.api.blueprint import Blueprint
from todo_api.api.body import MERGE_PATCH
from todo_api.api.current import database
from todo_api.api.identity import current_user
from todo_api.api.openapi import INVALID_QUERY, Api, answer_headers, documented
from todo_api.api.problems import MalformedRequest, VersionMismatch
from todo_api.api.responses import list_response, task_response, unless_current
from todo_api.api.schemas import EXAMPLE, LIST_LIMIT, NewTask, Task, TaskChanges, TaskQuery

KEY_LENGTH = 255
NO_SUCH_TASK = "No such task"
_LARGEST_ID = 2**63 - 1  # of PostgreSQL's bigint

blueprint = Blueprint("tasks", __name__, url_prefix="/api/tasks", description="Things to do.")


class TaskId(BaseConverter):
    """A positive 64-bit integer in ASCII digits. Any other path is a 404 and does not reach the database."""

    regex = "[1-9][0-9]{0,18}"

    def to_python(self, value: str) -> int:
        """Return the id."""
        # After a ValidationError, Werkzeug would try the rules of other methods and answer with a 405.
        return task_id if (task_id := int(value)) <= _LARGEST_ID else abort(404, NO_SUCH_TASK)


def init_app(app: Flask, api: Api) -> None:
    """Add the calls to the application and to its document."""
    app.url_map.merge_slashes = False  # two slashes in a path are another URL: a 404, not a redirect
    app.url_map.converters["task_id"] = TaskId
    api.register_converter(TaskId, lambda _: {"type": "integer", "format": "int64", "minimum": 1})
    api.register_blueprint(blueprint)


def _change(statement: str, task_id: int, **parameters: Any) -> Response:
    """Run a statement that changes a task, if the task is at a version that If-Match names."""
    versions = conditions.if_match_versions()
    if_match = f"{{{','.join(versions)}}}"  # an array, as PostgreSQL writes it
    while True:
        user_id = current_user()
        task = database.fetch_json(statement, user_id=user_id, task_id=task_id, if_match=if_match, **parameters)
        if task:
            return task_response(task)
        current = database.fetch_json("tasks/get", user_id=user_id, task_id=task_id) if versions else None
        etag = conditions.task_etag(current or abort(404, NO_SUCH_TASK))
        # Between the two statements the task may have come to a version that If-Match names: then try again.
        if etag.strip('"') not in versions:
            raise VersionMismatch(etag)


@blueprint.route("")
@blueprint.arguments(TaskQuery(), location="query")
@blueprint.response(
    200, Task(many=True), example=[EXAMPLE], headers=answer_headers("ETag of a list", "Link", "Cache-Control")
)
@documented(304, INVALID_QUERY, 413, 500, 503, takes=["If-None-Match"])
def list_tasks(query: dict[str, Any]) -> Response:
    """List tasks.

    Your tasks, newest first. If there are more than `limit`, the `Link` header leads to the next page. A page starts
    after the last task of the page before, even if tasks were created or deleted meanwhile.
    """
    limit = query.get("limit", LIST_LIMIT)
    tasks, count = database.fetch_json_list(
        "tasks/list",
        user_id=current_user(),
        limit=limit + 1,  # one more shows whether there is a next page
        completed=json.dumps(query["completed"]) if "completed" in query else "",
        q=query.get("q", ""),
        after=query.get("after", pages.FIRST_PAGE),
    )
    page, cursor = pages.without_last(tasks) if count > limit else (tasks, "")
    response = list_response(page, cursor)
    if cursor:
        response.headers["Link"] = pages.next_link(request.path, request.args, cursor)
    return unless_current(response)


@blueprint.route("", methods=["POST"])
@blueprint.arguments(NewTask(), example={"title": "Buy milk"})
@blueprint.response(201, Task, example=EXAMPLE, headers=answer_headers("Location", "ETag", "Cache-Control"))
@documented(400, 413, 415, 422, 500, 503, takes=["Idempotency-Key"])
def create_task(task: dict[str, Any]) -> Response:
    """Create a task.

    Only the title is required. Text is stored exactly as it was sent. With an `Idempotency-Key`, a client can retry
    the request without creating another task.
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
    response = task_response(created, 201)
    response.headers["Location"] = f"{request.path}/{json.loads(created)['id']}"
    return response


@blueprint.route("/<task_id:task_id>")
@blueprint.response(200, Task, example=EXAMPLE, headers=answer_headers("ETag", "Cache-Control"))
@documented(304, 404, 413, 500, 503, takes=["If-None-Match"])
def get_task(task_id: int) -> Response:
    """Get a task.

    With the `ETag` of an earlier answer in `If-None-Match`, a task that has not changed since is a 304.
    """
    task = database.fetch_json("tasks/get", user_id=current_user(), task_id=task_id)
    return unless_current(task_response(task or abort(404, NO_SUCH_TASK)))


@blueprint.route("/<task_id:task_id>", methods=["PATCH"])
@blueprint.arguments(TaskChanges(), example={"completed": True})
@blueprint.response(200, Task, example=EXAMPLE, headers=answer_headers("ETag", "Cache-Control"))
@documented(
    *(400, 404, 412, 413, 415, 500, 503),
    takes=["If-Match"],
    requestBody={"content": {MERGE_PATCH: {"schema": TaskChanges, "example": {"description": None}}}},
)
def update_task(changes: dict[str, Any], task_id: int) -> Response:
    """Change a task.

    The body is a JSON Merge Patch (RFC 7396): absent fields keep their values, `null` clears the description, and
    `{}` changes nothing.
    """
    return _change("tasks/update", task_id, changes=json.dumps(changes))


@blueprint.route("/<task_id:task_id>", methods=["DELETE"])
@blueprint.response(200, Task, example=EXAMPLE, headers=answer_headers("ETag", "Cache-Control"))
@documented(404, 412, 413, 500, 503, takes=["If-Match"])
def delete_task(task_id: int) -> Response:
    """Delete a task.

    The answer is the task as it was before.
    """
    return _change("tasks/delete", task_id)


@blueprint.route("/<task_id:task_id>/toggle", methods=["POST"])
@blueprint.response(200, Task, example=EXAMPLE, headers=answer_headers("ETag", "Cache-Control"))
@documented(404, 412, 413, 500, 503, takes=["If-Match"])
def toggle_task(task_id: int) -> Response:
    """Toggle a task.

    Flips `completed`. No body is needed. Concurrent toggles all count.
    """
    return _change("tasks/toggle", task_id)
