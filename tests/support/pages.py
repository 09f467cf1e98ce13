"""Pages of a list of tasks, and a statement that stores many tasks."""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import httpx

Row = dict[str, Any]
SEED = """
INSERT INTO tasks (user_id, title, description, completed, created_at, updated_at)
SELECT
    'local', title || n, description, mod(n, 2) = 0,
    -- Three tasks share each moment.
    '2026-01-11 09:30:00.123456+00'::timestamptz + n / 3 * interval '1 microsecond', now()
FROM generate_series(1, %(count)s) AS n,
    LATERAL (SELECT CASE WHEN mod(n, 3) = 0 THEN 'Buy milk ' ELSE 'Task ' END AS title) AS a,
    LATERAL (SELECT CASE WHEN mod(n, 5) = 0 THEN 'more MILK' END AS description) AS b
"""


def link_of(response: httpx.Response) -> str | None:
    """Return the target of a response's link to the next page, which must be a relative reference to the list."""
    if "Link" not in response.headers:
        return None
    match = re.fullmatch(r'<(/api/tasks\?[!-;=?-~]*)>; rel="next"', response.headers["Link"])
    assert match, response.headers["Link"]
    return match[1]


def pages(client: httpx.Client, **query: object) -> Iterator[list[Row]]:
    """Yield each page of a list by following the links."""
    link: str | None = f"/api/tasks?{urlencode(query)}"
    followed: set[str] = set()
    while link:
        assert link not in followed, "a link leads back to an earlier page"
        followed.add(link)
        response = client.get(link)
        assert response.status_code == httpx.codes.OK, response.text
        yield response.json()
        link = link_of(response)
