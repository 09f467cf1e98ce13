"""Pages of a list: cursors, and the link to the next page."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from urllib.parse import urlencode

from todo_api.database import SEPARATOR

FIRST_CURSOR = "253402300800000000_1"  # of the first page: the year 10000 is newer than every task
# In bytes. 10 000 of the largest tasks have 90 MB, or 132 MB if their texts are control characters, which JSON escapes.
_LARGEST_PAGE = 96 * 1024 * 1024
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def page_of(arrays: list[bytes], count: int, limit: int) -> tuple[bytes, str]:
    """Return an array of the tasks of a page, and the cursor of the next page, or '' if this is the last one.

    ``arrays`` have ``count`` tasks, one more than ``limit`` if there is a next page. The page also ends with the last
    array that fits into 96 MiB.
    """
    fitting = sum(size <= _LARGEST_PAGE for size in accumulate(map(len, arrays)))
    kept = arrays[: max(fitting, 1)]
    has_next = count > limit or len(kept) < len(arrays)
    if count > limit and len(kept) == len(arrays):
        but_one, separator, _ = kept.pop().rpartition(SEPARATOR)
        kept += [but_one + b"]"] if separator else []
    return _joined(kept), _cursor_after(kept[-1]) if has_next else ""


def _joined(arrays: list[bytes]) -> bytes:
    """Return an array of the elements of arrays. It copies them once, because they can be large."""
    parts: list[bytes | memoryview] = [b"["]
    for array in arrays or [b"[]"]:
        parts += [memoryview(array)[1:-1], SEPARATOR]
    return b"".join([*parts[:-1], b"]"])


def _cursor_after(tasks: bytes) -> str:
    """Return the cursor of the page that starts after the last task of an array."""
    last = json.loads(tasks[1:-1].rpartition(SEPARATOR)[2])
    microseconds = (datetime.fromisoformat(last["created_at"]) - _EPOCH) // timedelta(microseconds=1)
    return f"{microseconds}_{last['id']}"


def next_link(path: str, query: Mapping[str, str], cursor: str) -> str:
    """Return the Link header to the next page (RFC 8288): a relative URL with the same query and the new cursor."""
    next_query = urlencode({**query, "after": cursor})
    return f'<{path}?{next_query}>; rel="next"'
