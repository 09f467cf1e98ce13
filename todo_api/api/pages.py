"""Pages of a list: where one ends, and the link to the next one."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

from todo_api.database import SEPARATOR

FIRST_PAGE = "253402300800000000_1"  # the cursor of the year 10000, before the newest task
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def without_last(tasks: bytes) -> tuple[bytes, str]:
    """Return an array of tasks without its last one, and the cursor after which that one follows."""
    page = tasks[: tasks.rindex(SEPARATOR)]
    last = json.loads(page[1:].rpartition(SEPARATOR)[2])
    microseconds = (datetime.fromisoformat(last["created_at"]) - _EPOCH) // timedelta(microseconds=1)
    return page + b"]", f"{microseconds}_{last['id']}"


def next_link(path: str, query: Mapping[str, str], cursor: str) -> str:
    """Return the Link header to the next page (RFC 8288): relative, and with the same filters."""
    following = urlencode({**query, "after": cursor})
    return f'<{path}?{following}>; rel="next"'
