"""What comes in and what goes out: marshmallow schemas, which are also the schemas of the OpenAPI document."""

import re
from typing import Any

from marshmallow import INCLUDE, RAISE, Schema, ValidationError, fields, validate

TITLE_LENGTH = 200
DESCRIPTION_LENGTH = 2000
LIST_LIMIT = 10_000
# What str.isspace() calls white space: Unicode's, and four separators. The table's constraint lists the same.
_WHITE_SPACE = r"\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_NO_NUL = r"^[^\x00]*$"  # PostgreSQL's text has none

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
    """A JSON boolean: ``"yes"``, ``1`` and ``"true"``, which marshmallow would take, are refused."""

    def _deserialize(self, value: Any, *_args: Any, **_kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


def _not_blank(title: str) -> None:
    if not title or title.isspace():
        raise ValidationError("Title must not be empty or only white space")


def _title(*, required: bool) -> fields.String:
    return fields.String(
        required=required,
        validate=[
            validate.Length(max=TITLE_LENGTH, error="Title exceeds maximum length of {max} characters"),
            _not_blank,
        ],
        error_messages={
            "required": "Title is required",
            "null": "Title must not be null",
            "invalid": "Title must be a string",
        },
        metadata={
            "description": "What is to be done; not only white space.",
            "examples": [EXAMPLE["title"]],
            "minLength": 1,
            "pattern": f"[^{_WHITE_SPACE}]",
            "not": {"pattern": r"\x00"},
        },
    )


class TaskChanges(Schema):
    """The members of a task that a client may change."""

    class Meta:
        """Refuse what is not a member."""

        unknown = RAISE

    error_messages = {"unknown": "Not a member that can be sent; these are title, description and completed"}

    title = _title(required=False)
    description = fields.String(
        allow_none=True,
        validate=validate.Length(
            max=DESCRIPTION_LENGTH, error="Description exceeds maximum length of {max} characters"
        ),
        error_messages={"invalid": "Description must be a string or null"},
        metadata={
            "description": 'More about it. `""` and `null` are different, and both are kept.',
            "examples": ["two litres", None],
            "pattern": _NO_NUL,
        },
    )
    completed = StrictBoolean(
        error_messages={"null": "Completed must be true or false", "invalid": "Completed must be true or false"},
        metadata={"description": "Whether it is done.", "examples": [True]},
    )


class NewTask(TaskChanges):
    """A task as a client creates it: only the title is required."""

    title = _title(required=True)


def _shown(name: str, description: str, **rules: Any) -> dict[str, Any]:
    """Describe a member of a task in the document, with the example's value."""
    return {"description": description, "examples": [EXAMPLE[name]], **rules}


class Task(Schema):
    """A task, always with exactly these members."""

    id = fields.Integer(required=True, metadata=_shown("id", "Given by the database.", format="int64", minimum=1))
    title = fields.String(
        required=True, metadata=_shown("title", "What is to be done.", minLength=1, maxLength=TITLE_LENGTH)
    )
    description = fields.String(
        required=True, allow_none=True, metadata=_shown("description", "More about it.", maxLength=DESCRIPTION_LENGTH)
    )
    completed = fields.Boolean(required=True, metadata=_shown("completed", "Whether it is done."))
    user_id = fields.String(required=True, metadata=_shown("user_id", "Whose task it is."))
    version = fields.Integer(
        required=True,
        metadata=_shown("version", "Starts at 1 and grows by 1 with each change.", format="int64", minimum=1),
    )
    created_at = fields.DateTime(required=True, metadata=_shown("created_at", "RFC 3339, in UTC."))
    updated_at = fields.DateTime(
        required=True, metadata=_shown("updated_at", "RFC 3339, in UTC; strictly increases with each change.")
    )


class Limit(fields.Integer):
    """A number of tasks, in plain digits: ``int()`` would take ``+5``, ``5_0`` and digits of other scripts, too."""

    def _deserialize(self, value: Any, *_args: Any, **_kwargs: Any) -> int:
        if not re.fullmatch("[0-9]{1,9}", value):
            raise self.make_error("invalid", input=value)
        return int(value)


def _is_cursor(after: str) -> None:
    cursor = re.fullmatch("(?:-?[0-9]{1,17}|[0-9]{18})_([0-9]{1,19})", after)
    if not cursor or int(cursor[1]) >= 2**63:
        raise ValidationError("After must be a cursor, from the link to the next page")


def _is_text(text: str) -> None:
    if "\0" in text:
        raise ValidationError("No text has a NUL")


class TaskQuery(Schema):
    """Which tasks to list."""

    class Meta:
        """Refuse what is not a parameter."""

        unknown = RAISE

    error_messages = {"unknown": "Unknown parameter"}

    limit = Limit(
        validate=validate.Range(1, LIST_LIMIT, error="Limit must be between {min} and {max}"),
        error_messages={"invalid": "Limit must be a whole number"},
        metadata={"description": "How many tasks at most.", "default": LIST_LIMIT, "examples": [50]},
    )
    after = fields.String(
        validate=_is_cursor,
        metadata={
            "description": "Where the page before ended: part of its link to the next page. Opaque; send it as it is.",
            "pattern": "^(-?[0-9]{1,17}|[0-9]{18})_[0-9]{1,18}$",
        },
    )
    completed = fields.Boolean(
        truthy={"true"},
        falsy={"false"},
        error_messages={"invalid": "Completed must be true or false"},
        metadata={"description": "Only tasks that are completed, or only those that are not."},
    )
    q = fields.String(
        validate=_is_text,
        metadata={
            "description": "Only tasks with this text in the title or the description, in upper or lower case.",
            "examples": ["milk"],
            "pattern": _NO_NUL,
        },
    )


class Violation(Schema):
    """One thing that is wrong with a request."""

    pointer = fields.String(metadata={"description": "Where in the body (a JSON Pointer, RFC 6901)."})
    parameter = fields.String(metadata={"description": "Which query parameter."})
    detail = fields.String(required=True, metadata={"description": "What is wrong with it."})


class Problem(Schema):
    """Why a request failed (RFC 9457)."""

    class Meta:
        """Leave room for more members, as the RFC does."""

        unknown = INCLUDE

    type = fields.String(required=True, metadata={"description": "Which kind of problem: for programs."})
    title = fields.String(required=True, metadata={"description": "Its name: for people."})
    status = fields.Integer(required=True, metadata={"description": "The HTTP status."})
    detail = fields.String(required=True, metadata={"description": "What happened here."})
    instance = fields.String(required=True, metadata={"description": "The path that was asked for."})
    errors = fields.List(fields.Nested(Violation), metadata={"description": "Every field or parameter that is wrong."})
