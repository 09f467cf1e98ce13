"""The marshmallow schemas of requests and responses. The OpenAPI document has them too."""

import re
from typing import Any

from marshmallow import INCLUDE, RAISE, Schema, ValidationError, fields, validate

MAX_TITLE_LENGTH = 200
MAX_DESCRIPTION_LENGTH = 2000
MAX_KEY_LENGTH = 255  # of an Idempotency-Key
MAX_LIMIT = 10_000
# A character of q takes up to 12 bytes in a URL. With this limit, the link to the next page fits into the 4096 bytes
# that servers and proxies accept in a request line and in headers.
MAX_Q_LENGTH = 250
# The characters for which str.isspace() is true. The constraint of the table lists the same characters.
_WHITE_SPACE = r"\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_NO_NUL = r"^[^\x00]*$"  # PostgreSQL's text cannot contain a NUL

EXAMPLE = {
    "id": 42,
    "title": "Buy milk",
    "description": None,
    "completed": False,
    "user_id": "local",
    "version": 1,
    "created_at": "2026-01-11T09:30:00.123456+00:00",
    "updated_at": "2026-01-11T09:30:00.123456+00:00",
}


class StrictBoolean(fields.Boolean):
    """A JSON boolean. marshmallow's own field also accepts ``"yes"``, ``1`` and ``"true"``."""

    def _deserialize(self, value: Any, *_args: Any, **_kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


def _check_not_blank(title: str) -> None:
    if not title or title.isspace():
        raise ValidationError("Title must not be blank")


def _title(*, required: bool) -> fields.String:
    return fields.String(
        required=required,
        validate=[
            validate.Length(max=MAX_TITLE_LENGTH, error="Title exceeds maximum length of {max} characters"),
            _check_not_blank,
        ],
        error_messages={
            "required": "Title is required",
            "null": "Title must not be null",
            "invalid": "Title must be a string",
        },
        metadata={
            "description": "What to do. It must not be blank.",
            "examples": [EXAMPLE["title"]],
            "minLength": 1,
            "pattern": f"[^{_WHITE_SPACE}]",
            "not": {"pattern": r"\x00"},
        },
    )


class TaskChanges(Schema):
    """The fields of a task that a client may change."""

    class Meta:
        """Reject unknown fields."""

        unknown = RAISE

    error_messages = {"unknown": "Unknown field (the fields are title, description and completed)"}

    title = _title(required=False)
    description = fields.String(
        allow_none=True,
        validate=validate.Length(
            max=MAX_DESCRIPTION_LENGTH, error="Description exceeds maximum length of {max} characters"
        ),
        error_messages={"invalid": "Description must be a string or null"},
        metadata={
            "description": 'Details. `""` and `null` are different values.',
            "examples": ["two litres", None],
            "pattern": _NO_NUL,
        },
    )
    completed = StrictBoolean(
        error_messages={"null": "Completed must be true or false", "invalid": "Completed must be true or false"},
        metadata={"description": "Whether the task is done.", "examples": [True]},
    )


class NewTask(TaskChanges):
    """The fields of a new task. Only the title is required."""

    title = _title(required=True)


def _documentation(name: str, description: str, **rules: Any) -> dict[str, Any]:
    """Return the documentation of a field of a task, with its value in EXAMPLE."""
    return {"description": description, "examples": [EXAMPLE[name]], **rules}


class Task(Schema):
    """A task. It always has exactly these fields."""

    id = fields.Integer(
        required=True, metadata=_documentation("id", "Assigned by the database.", format="int64", minimum=1)
    )
    title = fields.String(
        required=True, metadata=_documentation("title", "What to do.", minLength=1, maxLength=MAX_TITLE_LENGTH)
    )
    description = fields.String(
        required=True,
        allow_none=True,
        metadata=_documentation("description", "Details.", maxLength=MAX_DESCRIPTION_LENGTH),
    )
    completed = fields.Boolean(required=True, metadata=_documentation("completed", "Whether the task is done."))
    user_id = fields.String(required=True, metadata=_documentation("user_id", "The owner of the task."))
    version = fields.Integer(
        required=True,
        metadata=_documentation("version", "Starts at 1 and grows by 1 with each change.", format="int64", minimum=1),
    )
    created_at = fields.DateTime(required=True, metadata=_documentation("created_at", "RFC 3339, in UTC."))
    updated_at = fields.DateTime(
        required=True, metadata=_documentation("updated_at", "RFC 3339, in UTC; strictly increases with each change.")
    )


class Limit(fields.Integer):
    """A number in ASCII digits. ``int()`` also accepts ``+5``, ``5_0`` and digits of other scripts."""

    def _deserialize(self, value: Any, *_args: Any, **_kwargs: Any) -> int:
        if not re.fullmatch("[0-9]{1,9}", value):
            raise self.make_error("invalid", input=value)
        return int(value)


def _at_most(limit: str) -> str:
    """Return a regular expression for the numbers from 0 to ``limit``."""
    rest = len(limit) - 1
    smaller = [f"{limit[:n]}[0-{int(digit) - 1}][0-9]{{{rest - n}}}" for n, digit in enumerate(limit) if digit != "0"]
    return "|".join([f"[0-9]{{1,{rest}}}", *smaller, limit])


# The microseconds since 1970 and the id of a task. PostgreSQL supports all times with this number of digits (1200 BC to
# 33658).
_CURSOR = f"(-?[0-9]{{1,17}}|[0-9]{{18}})_({_at_most(str(2**63 - 1))})"


def _check_cursor(after: str) -> None:
    if not re.fullmatch(_CURSOR, after):
        raise ValidationError("The parameter after must be the cursor from a link to the next page")


def _check_text(text: str) -> None:
    if "\0" in text:
        raise ValidationError("The parameter q must not contain a NUL")


class TaskQuery(Schema):
    """The parameters of a list."""

    class Meta:
        """Reject unknown parameters."""

        unknown = RAISE

    error_messages = {"unknown": "Unknown parameter"}

    limit = Limit(
        validate=validate.Range(1, MAX_LIMIT, error="Limit must be between {min} and {max}"),
        error_messages={"invalid": "Limit must be a whole number"},
        metadata={"description": "The largest number of tasks to return.", "default": MAX_LIMIT, "examples": [50]},
    )
    after = fields.String(
        validate=_check_cursor,
        metadata={
            "description": "The cursor of the page, from the link of the page before it. It is opaque.",
            "pattern": f"^{_CURSOR}$",
        },
    )
    completed = fields.Boolean(
        truthy={"true"},
        falsy={"false"},
        error_messages={"invalid": "Completed must be true or false"},
        metadata={"description": "Only completed tasks, or only open ones."},
    )
    q = fields.String(
        validate=[
            validate.Length(max=MAX_Q_LENGTH, error="The parameter q must have at most {max} characters"),
            _check_text,
        ],
        metadata={
            "description": "Only tasks that contain this text in the title or the description; case-insensitive.",
            "examples": ["milk"],
            "pattern": _NO_NUL,
        },
    )


class Violation(Schema):
    """One error in a request."""

    pointer = fields.String(metadata={"description": "The invalid field of the body (a JSON Pointer, RFC 6901)."})
    parameter = fields.String(metadata={"description": "The invalid query parameter."})
    detail = fields.String(required=True, metadata={"description": "The error."})


class Problem(Schema):
    """The reason why a request failed (RFC 9457)."""

    class Meta:
        """Allow more fields, as the RFC does."""

        unknown = INCLUDE

    type = fields.String(required=True, metadata={"description": "The kind of problem, for programs."})
    title = fields.String(required=True, metadata={"description": "The kind of problem, for people."})
    status = fields.Integer(required=True, metadata={"description": "The HTTP status."})
    detail = fields.String(required=True, metadata={"description": "What is wrong with this request."})
    instance = fields.String(required=True, metadata={"description": "The path of the request."})
    errors = fields.List(fields.Nested(Violation), metadata={"description": "Every invalid field or parameter."})
