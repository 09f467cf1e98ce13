"""Pages of a list: cursors, and the link to the next page."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

from todo_api.database import SEPARATOR

FIRST_CURSOR = "253402300800000000_1"  # of the first page: the year 10000 is newer than every task
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def split_page(tasks: bytes) -> tuple[bytes, str]:
    """Return an array of tasks without its last one, and the cursor of the next page.

    The removed task only shows that there is a next page. The cursor names the last task that remains.
    """
    page = tasks[: tasks.rindex(SEPARATOR)]
    last = json.loads(page[1:].rpartition(SEPARATOR)[2])
    microseconds = (datetime.fromisoformat(last["created_at"]) - _EPOCH) // timedelta(microseconds=1)
    return page + b"]", f"{microseconds}_{last['id']}"


def next_link(path: str, query: Mapping[str, str], cursor: str) -> str:
    """Return the Link header to the next page (RFC 8288): a relative URL with the same query and the new cursor."""
    next_query = urlencode({**query, "after": cursor})
    return f'<{path}?{next_query}>; rel="next"'
