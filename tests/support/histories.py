"""Histories: does some order of the calls on a task explain every answer that they got?

Such an order fits the clock (a call that ended before another began comes first), and each answer in it is what a
service says that does one call at a time: linearisability, of each task by itself, searched for as Wing and Gong do.
"""

import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any, NamedTuple

Row = Mapping[str, Any]
ENOUGH = 1_000_000  # steps of a search; a history that can be explained takes few more than it has calls
Absent = enum.Enum("Absent", ["NOT_YET", "GONE"])


class Task(NamedTuple):
    """What calls change of a task."""

    title: str
    description: str | None
    completed: bool
    version: int


@dataclass(frozen=True)
class Call:
    """A call on a task and what came of it, times in seconds; a list is a get of each task, those it lacks included.

    ``condition`` is the version in If-Match, or in a get's If-None-Match; ``version`` is the one in ETag. A call
    without an answer or with a 503 may have taken effect: until ``latest``, or never.
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
        """Whether the answer says what the call did."""
        return self.status not in (0, 503)


class UnexplainedError(AssertionError):
    """No order of the calls explains their answers."""


class _Node(NamedTuple):
    """Where a search is: the calls that have a place, or get none any more, as bits; the state and the time there."""

    placed: int
    state: Task | Absent
    time: float


def expected(state: Task | Absent, call: Call) -> tuple[int, Task | None, Task | Absent]:
    """Say what a call does where nothing else goes on: the status, the task that it shows and the state after it."""
    if call.verb == "create":  # with a key that came before: the first answer, whatever became of the task
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
    """Give an order of a task's calls that explains them, without the unanswered ones that had no effect.

    Raises:
        UnexplainedError: there is none.

    """
    seen = _versions([call.row for call in history if call.row])
    calls = sorted((call for call in history if call.answered or call.verb != "get"), key=lambda call: call.started)
    stack = [_Node(0, Absent.NOT_YET, -math.inf)]
    steps: dict[_Node, tuple[_Node, Call] | None] = {stack[0]: None}  # each node is looked at once
    while stack and len(steps) < ENOUGH:
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
    """Give the task at each version that was seen; it is the same for all who saw it, and its time grows with it."""
    seen: dict[int, Row] = {}
    for row in rows:
        if seen.setdefault(row["version"], row) != row:
            raise UnexplainedError(f"one version, two tasks: {row} and {seen[row['version']]}")
    for earlier, later in pairwise(seen[version] for version in sorted(seen)):
        times = [datetime.fromisoformat(row["updated_at"]) for row in (earlier, later)]
        if times[0] >= times[1] or any(earlier[name] != later[name] for name in ("id", "user_id", "created_at")):
            raise UnexplainedError(f"this is no later version of the same task: {earlier} and {later}")
    return {version: _task(row) for version, row in seen.items()}


def _task(row: Row) -> Task:
    return Task(**{name: row[name] for name in Task._fields})


def _window(calls: Sequence[Call], placed: int) -> list[int]:
    """Find the calls that may be next: none with an answer ended before they began."""
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
    """Place one more call, in each way that may matter."""
    found = []
    for index in window:
        call = calls[index]
        status, shown, state = expected(node.state, call)
        if _fits(call, status, shown) if call.answered else state != node.state:
            now = max(node.time, call.started)
            late = [other for other in window if not calls[other].answered and calls[other].latest < now]
            found.append((index, _Node(node.placed | sum(1 << one for one in {index, *late}), state, now)))
            if state == node.state and not late:  # it changes nothing, so that it can't be wrong here
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
