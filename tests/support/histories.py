"""A check of histories: does some order of the calls on a task explain every response?

In such an order, a call that ended before another call began comes first, and each response is the one that a service
without concurrency sends. This is linearizability of each task. The search for an order is that of Wing and Gong.
"""

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

Row = Mapping[str, Any]
MAX_STEPS = 1_000_000  # of a search; it takes few more steps than calls to explain a history
Absent = enum.Enum("Absent", ["NOT_YET", "GONE"])


class Task(NamedTuple):
    """The fields of a task that calls change."""

    title: str
    description: str | None
    completed: bool
    version: int


@dataclass(frozen=True)
class Call:
    """A call on a task and its result, with times in seconds.

    A list is recorded as a get of each task; a task that is not in the list is a 404. ``condition`` is the version in
    If-Match, or in If-None-Match for a get. ``version`` is the one in ETag. ``status`` is 0 if there was no response. A
    call without a response or with a 503 took effect before ``latest``, or it never takes effect.
    """

    verb: str
    started: float
    ended: float
    status: int
    sent: Row = field(default_factory=dict)
    condition: int | None = None
    row: Row | None = None
    version: int | None = None
    latest: float = math.inf

    @property
    def answered(self) -> bool:
        """Whether the response tells what the call did."""
        return self.status not in (0, 503)


class UnexplainedError(AssertionError):
    """No order of the calls explains their responses."""


class _Node(NamedTuple):
    """A node of the search: the calls that are placed or can no longer be placed, as bits; the state; the time."""

    placed: int
    state: Task | Absent
    time: float


def expected(state: Task | Absent, call: Call) -> tuple[int, Task | None, Task | Absent]:
    """Return what a call does without concurrent calls: the status, the task in the response, and the next state."""
    if call.verb == "create":  # a repeated key repeats the first response, even if the task has changed since
        first = Task(**{"description": None, "completed": False, "version": 1, **call.sent})
        return 201, first, first if state is Absent.NOT_YET else state
    if isinstance(state, Absent):
        return 404, None, state
    if call.verb == "get":
        return 304 if call.condition == state.version else 200, state, state
    if call.condition not in (None, state.version):
        return 412, state, state
    if call.verb == "delete":
        return 200, state, Absent.GONE
    changed = state._replace(**({"completed": not state.completed} if call.verb == "toggle" else call.sent))
    changed = changed if changed == state else changed._replace(version=state.version + 1)
    return 200, changed, changed


def explain(history: Sequence[Call]) -> list[Call]:
    """Return an order of a task's calls that explains their responses, without the unanswered calls that had no effect.

    Raises:
        UnexplainedError: there is no such order.

    """
    seen = _versions([call.row for call in history if call.row])
    calls = sorted((call for call in history if call.answered or call.verb != "get"), key=lambda call: call.started)
    stack = [_Node(0, Absent.NOT_YET, -math.inf)]
    steps: dict[_Node, tuple[_Node, Call] | None] = {stack[0]: None}  # each node is visited once
    while stack and len(steps) < MAX_STEPS:
        node = stack.pop()
        window = _window(calls, node.placed)
        if not any(calls[index].answered for index in window):
            return _order(steps, node)
        for index, after in _next(calls, window, node):
            is_seen = not isinstance(after.state, Task) or seen.get(after.state.version, after.state) == after.state
            if is_seen and after not in steps:
                steps[after] = node, calls[index]
                stack.append(after)
    best = max(steps, key=lambda node: node.placed.bit_count())
    stuck = [calls[index] for index in _window(calls, best.placed)]
    lines = [*_order(steps, best)[-5:], f"the task is {best.state}, and none of these can be next:", *stuck]
    raise UnexplainedError("\n  ".join(map(str, lines)))


def _versions(rows: Sequence[Row]) -> dict[int, Task]:
    """Return the task at each version in the rows. Check that a version has one content, and that times increase."""
    seen: dict[int, Row] = {}
    for row in rows:
        if seen.setdefault(row["version"], row) != row:
            raise UnexplainedError(f"two tasks have the same version: {row} and {seen[row['version']]}")
    for earlier, later in pairwise(seen[version] for version in sorted(seen)):
        times = [datetime.fromisoformat(row["updated_at"]) for row in (earlier, later)]
        if times[0] >= times[1] or any(earlier[name] != later[name] for name in ("id", "user_id", "created_at")):
            raise UnexplainedError(f"the second is not a later version of the first: {earlier} and {later}")
    return {version: _task(row) for version, row in seen.items()}


def _task(row: Row) -> Task:
    return Task(**{name: row[name] for name in Task._fields})


def _window(calls: Sequence[Call], placed: int) -> list[int]:
    """Return the indexes of the calls that may be next: no other unplaced response arrived before they started."""
    window, horizon = [], math.inf
    for index in range((~placed & (placed + 1)).bit_length() - 1, len(calls)):
        if calls[index].started > horizon:
            break
        if not placed >> index & 1:
            window.append(index)
            if calls[index].answered:
                horizon = min(horizon, calls[index].ended)
    return window


def _next(calls: Sequence[Call], window: Sequence[int], node: _Node) -> Iterator[tuple[int, _Node]]:
    """Yield the index of each call that can be next, and the node after it."""
    found = []
    for index in window:
        call = calls[index]
        status, shown, state = expected(node.state, call)
        if _fits(call, status, shown) if call.answered else state != node.state:
            now = max(node.time, call.started)
            late = [other for other in window if not calls[other].answered and calls[other].latest < now]
            found.append((index, _Node(node.placed | sum(1 << one for one in {index, *late}), state, now)))
            if state == node.state and not late:  # a call that changes nothing can always be placed now
                found = found[-1:]
                break
    yield from found


def _fits(call: Call, status: int, shown: Task | None) -> bool:
    same = call.row is None or _task(call.row) == shown
    return same and (call.status, call.version) == (status, shown and shown.version)


def _order(steps: Mapping[_Node, tuple[_Node, Call] | None], node: _Node) -> list[Call]:
    order = []
    while step := steps[node]:
        node, call = step
        order.append(call)
    return order[::-1]
