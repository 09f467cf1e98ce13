"""Pages of a list: where one ends, and the link to the next."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode

FIRST = "253402300800000000_1"  # the year 10000, which comes before the newest task
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# What json_agg puts between the elements of an array; no string holds it, where a line break is \n.
_BETWEEN = b", \n "


def cut(tasks: bytes) -> tuple[bytes, str]:
    """Cut the last task off a JSON array of several, and give the cursor of the page that begins with it."""
    page = tasks[: tasks.rindex(_BETWEEN)]
    last = json.loads(page[1:].rpartition(_BETWEEN)[2])
    microseconds = (datetime.fromisoformat(last["created_at"]) - _EPOCH) // timedelta(microseconds=1)
    return page + b"]", f"{microseconds}_{last['id']}"


def next_link(path: str, query: Mapping[str, str], cursor: str) -> str:
    """Give the Link header to the next page (RFC 8288), relative, with the same filters."""
    following = urlencode({**query, "after": cursor})
    return f'<{path}?{following}>; rel="next"'
