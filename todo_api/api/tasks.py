"""The endpoints under /api/tasks."""

import json
from typing import Any

from flask import Flask, Response, abort, request
from werkzeug.routing import BaseConverter

from todo_api.api import conditions, pages
from todo_api.api.blueprint import Blueprint
from todo_api.api.body import MERGE_PATCH
from todo_api.api.current_database import database
from todo_api.api.identity import current_user
from todo_api.api.openapi import (
    INVALID_BODY,
    INVALID_QUERY,
    LIST_ETAG,
    UNSUPPORTED_PATCH,
    Api,
    documented,
    response_headers,
)
from todo_api.api.problems import MalformedRequest, VersionMismatch
from todo_api.api.responses import list_response, or_not_modified, task_response
from todo_api.api.schemas import EXAMPLE, MAX_KEY_LENGTH, MAX_LIMIT, NewTask, Task, TaskChanges, TaskQuery

NO_SUCH_TASK = "No such task"
_LARGEST_ID = 2**63 - 1  # of PostgreSQL's bigint

blueprint = Blueprint("tasks", __name__, url_prefix="/api/tasks", description="Things to do.")


class TaskId(BaseConverter):
    """A positive 64-bit integer in ASCII digits. A request with any other id does not reach the database."""

    regex = "[1-9][0-9]{0,18}"

    def to_python(self, value: str) -> int:
        """Return the id."""
        # After a ValidationError, Werkzeug would return a 405 because the path matches routes of other methods.
        return task_id if (task_id := int(value)) <= _LARGEST_ID else abort(404, NO_SUCH_TASK)


def init_app(app: Flask, api: Api) -> None:
    """Add the endpoints to the application and to the OpenAPI document."""
    app.url_map.merge_slashes = False  # a path with // is unknown: a 404, not a redirect
    app.url_map.converters["task_id"] = TaskId
    api.register_converter(TaskId, lambda _: {"type": "integer", "format": "int64", "minimum": 1})
    api.register_blueprint(blueprint)


def _change(statement: str, task_id: int, **parameters: Any) -> Response:
    """Run a statement that changes a task if it is at a version that If-Match names, and return the response."""
    versions = conditions.if_match_versions()
    if_match = f"{{{','.join(versions)}}}"  # an array in PostgreSQL's syntax
    while True:
        user_id = current_user()
        task = database.fetch_json(statement, user_id=user_id, task_id=task_id, if_match=if_match, **parameters)
        if task:
            return task_response(task)
        current = database.fetch_json("tasks/get", user_id=user_id, task_id=task_id) if versions else None
        etag = conditions.task_etag(current or abort(404, NO_SUCH_TASK))
        # Another request may have changed the task between the two statements. If its version matches now, retry.
        if etag.strip('"') not in versions:
            raise VersionMismatch(etag)


@blueprint.route("")
@blueprint.arguments(TaskQuery(), location="query")
@blueprint.response(
    200, Task(many=True), example=[EXAMPLE], headers=response_headers("Link", "Cache-Control") | {"ETag": LIST_ETAG}
)
@documented(304, INVALID_QUERY, 401, 413, 421, 500, 503, takes=["If-None-Match"])
def list_tasks(query: dict[str, Any]) -> Response:
    """List tasks.

    The response has the tasks of the user, newest first. If there are more than `limit`, or more than 96 MiB, the
    `Link` header leads to the next page. A page starts after the last task of the page before it, even if tasks were
    created or deleted in between.
    """
    limit = query.get("limit", MAX_LIMIT)
    arrays, count = database.fetch_json_list(
        "tasks/list",
        user_id=current_user(),
        limit=limit + 1,  # one more shows whether there is a next page
        completed=json.dumps(query["completed"]) if "completed" in query else "",
        q=query.get("q", ""),
        after=query.get("after", pages.FIRST_CURSOR),
    )
    page, cursor = pages.page_of(arrays, count, limit)
    response = list_response(page, cursor)
    if cursor:
        response.headers["Link"] = pages.next_link(request.root_path + request.path, request.args, cursor)
    return or_not_modified(response)


@blueprint.route("", methods=["POST"])
@blueprint.arguments(NewTask(), example={"title": "Buy milk"})
@blueprint.response(201, Task, example=EXAMPLE, headers=response_headers("Location", "ETag", "Cache-Control"))
@documented(INVALID_BODY, 401, 403, 413, 415, 421, 422, 500, 503, takes=["Idempotency-Key"])
def create_task(task: dict[str, Any]) -> Response:
    """Create a task.

    Only the title is required. Text is stored exactly as it was sent. With an `Idempotency-Key`, a client can retry
    the request, and only one task is created.
    """
    key = request.headers.get("Idempotency-Key")
    if key is None:
        created = database.fetch_json("tasks/create", user_id=current_user(), task=json.dumps(task))
    elif 1 <= len(key) <= MAX_KEY_LENGTH:
        created = database.fetch_json(
            "tasks/create_once", user_id=current_user(), task=json.dumps(task), idempotency_key=key
        )
        database.clear_abandoned_keys()
    else:
        raise MalformedRequest(f"Idempotency-Key must have 1 to {MAX_KEY_LENGTH} characters")
    created = created or abort(422)
    response = task_response(created, 201)
    response.headers["Location"] = f"{request.root_path}{request.path}/{json.loads(created)['id']}"
    return response


@blueprint.route("/<task_id:task_id>")
@blueprint.response(200, Task, example=EXAMPLE, headers=response_headers("ETag", "Cache-Control"))
@documented(304, 400, 401, 404, 413, 421, 500, 503, takes=["If-None-Match"])
def get_task(task_id: int) -> Response:
    """Get a task.

    If `If-None-Match` has the current `ETag` of the task, the response is a 304.
    """
    task = database.fetch_json("tasks/get", user_id=current_user(), task_id=task_id)
    return or_not_modified(task_response(task or abort(404, NO_SUCH_TASK)))


@blueprint.route("/<task_id:task_id>", methods=["PATCH"])
@blueprint.arguments(TaskChanges(), example={"completed": True})
@blueprint.response(200, Task, example=EXAMPLE, headers=response_headers("ETag", "Cache-Control"))
@documented(
    *(INVALID_BODY, 401, 403, 404, 412, 413, UNSUPPORTED_PATCH, 421, 500, 503),
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
@blueprint.response(200, Task, example=EXAMPLE, headers=response_headers("ETag", "Cache-Control"))
@documented(400, 401, 403, 404, 412, 413, 421, 500, 503, takes=["If-Match"])
def delete_task(task_id: int) -> Response:
    """Delete a task.

    The response is the task as it was before.
    """
    return _change("tasks/delete", task_id)


@blueprint.route("/<task_id:task_id>/toggle", methods=["POST"])
@blueprint.response(200, Task, example=EXAMPLE, headers=response_headers("ETag", "Cache-Control"))
@documented(400, 401, 403, 404, 412, 413, 421, 500, 503, takes=["If-Match"])
def toggle_task(task_id: int) -> Response:
    """Toggle a task.

    This flips `completed`. No body is needed. If several requests are concurrent, each of them counts.
    """
    return _change("tasks/toggle", task_id)
