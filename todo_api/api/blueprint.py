"""flask-smorest's blueprint with strict parsing of the body and the query."""

from typing import Any, NoReturn

import flask_smorest
from flask import Request
from marshmallow import RAISE, Schema, ValidationError
from webargs.flaskparser import FlaskParser

from todo_api.api import body, query
from todo_api.api.problems import InvalidRequest, field_errors


class Parser(FlaskParser):
    """webargs' parser. ``body`` and ``query`` parse the request, and then a schema checks the result."""

    DEFAULT_VALIDATION_STATUS = 400
    DEFAULT_UNKNOWN_BY_LOCATION = {**FlaskParser.DEFAULT_UNKNOWN_BY_LOCATION, "query": RAISE}

    def load_json(self, req: Request, schema: Schema) -> dict[str, Any]:
        """Return the JSON object in the body."""
        del req, schema
        return body.json_object()

    def load_querystring(self, req: Request, schema: Schema) -> dict[str, str]:
        """Return the query parameters."""
        del req, schema
        return query.parameters()

    def handle_error(self, error: ValidationError, *_args: Any, **_kwargs: Any) -> NoReturn:
        """Raise InvalidRequest with the errors of the schema."""
        raise InvalidRequest(field_errors(error.messages_dict)) from error


class Blueprint(flask_smorest.Blueprint):
    """flask-smorest's blueprint with the strict parser."""

    ARGUMENTS_PARSER = Parser()
