"""The format of every failure."""

from typing import Any

import httpx

from tests.support.service import Service


def assert_problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """Check that a response is a complete problem of this status and type, and return its members."""
    assert (response.status_code, response.headers["Content-Type"]) == (status, "application/problem+json")
    problem: dict[str, Any] = response.json()
    assert problem["type"] == kind
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert set(problem) - {"errors"} == {"type", "title", "status", "detail", "instance"}
    return problem


def assert_quick(service: Service, limit: float = 1) -> None:
    """Check that a service took less than a second, or what the limit is, for each of its 503s."""
    assert [seconds for seconds in service.took(httpx.codes.SERVICE_UNAVAILABLE) if seconds >= limit] == []
