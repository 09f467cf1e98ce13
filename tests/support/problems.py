"""The format of every failure."""

from typing import Any

import httpx


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
