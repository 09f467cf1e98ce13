"""The check of histories: it accepts those that an order of the calls explains, and rejects all others."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.support.histories import Absent, Call, Task, UnexplainedError, expected, explain


def answered(verb: str, started: float, ended: float, state: Task | Absent, **options: Any) -> Call:
    """Return a call with the response that it gets from a task in a state."""
    call = Call(verb, started, ended, 0, **options)
    status, shown, _ = expected(state, call)
    row = None
    if shown and status in (200, 201):
        at = f"2026-01-11T09:30:00.{shown.version:06}+00:00"
        row = {
            **shown._asdict(),
            "id": 1,
            "user_id": "local",
            "created_at": "2026-01-11T09:30:00+00:00",
            "updated_at": at,
        }
    return replace(call, status=status, row=row, version=shown and shown.version)


V1, V2, V3 = (Task("a", None, version == 2, version) for version in (1, 2, 3))
CREATED = answered("create", 0, 1, Absent.NOT_YET, sent={"title": "a"})
TOGGLED = answered("toggle", 2, 3, V1)
UNANSWERED = Call("toggle", 2, 3, 503, latest=3)
DELETED = answered("delete", 2, 3, V1)


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param([TOGGLED, answered("get", 4, 5, V1)], id="a stale read after an acknowledged write"),
        pytest.param([TOGGLED, answered("get", 4, 5, V1, condition=1)], id="a stale 304"),
        pytest.param([TOGGLED, answered("toggle", 2, 3, V1)], id="a lost toggle"),
        pytest.param([answered("toggle", 2, 3, V2)], id="a doubled toggle"),
        pytest.param([UNANSWERED, answered("get", 4, 5, V3)], id="a doubled toggle without a response"),
        pytest.param(
            [UNANSWERED, answered("get", 4, 5, V1), answered("get", 6, 7, V2)], id="a toggle that takes effect too late"
        ),
        pytest.param(
            [answered("toggle", 2, 9, V1), answered("get", 3, 4, V2), answered("get", 5, 6, V1)],
            id="a read that goes back",
        ),
        pytest.param(
            [answered("patch", 2, 3, V1, sent={"completed": True}), answered("get", 4, 5, V1)], id="a lost patch"
        ),
        pytest.param(
            [answered("patch", 2, 3, V1), answered("get", 4, 5, V1._replace(version=2))],
            id="a patch that changes nothing but the version",
        ),
        pytest.param([TOGGLED, answered("toggle", 4, 5, V1, condition=1)], id="an If-Match that is ignored"),
        pytest.param([answered("toggle", 2, 3, V2, condition=1)], id="a 412 without a reason"),
        pytest.param([replace(answered("toggle", 2, 3, V1, condition=2), version=3)], id="a 412 with a wrong ETag"),
        pytest.param([replace(TOGGLED, row=answered("get", 4, 5, V3).row)], id="an ETag of another version"),
        pytest.param([replace(TOGGLED, row={**(TOGGLED.row or {}), "id": 2})], id="a task that becomes another"),
        pytest.param([DELETED, answered("get", 4, 5, V1)], id="a task that comes back"),
        pytest.param([DELETED, answered("delete", 4, 5, V1)], id="a task that is deleted twice"),
        pytest.param([answered("get", 2, 3, Absent.GONE)], id="a list without an existing task"),
        pytest.param([Call("get", 2, 3, 500)], id="an unexpected status"),
        pytest.param([replace(CREATED, row={**(CREATED.row or {}), "id": 2})], id="two tasks of one create"),
        pytest.param(
            [replace(TOGGLED, row={**(TOGGLED.row or {}), "updated_at": "2026-01-11T09:30:00.000001+00:00"})],
            id="an updated_at that does not increase",
        ),
    ],
)
def test_an_impossible_history_is_rejected(calls: list[Call]) -> None:
    with pytest.raises(UnexplainedError):
        explain([CREATED, *calls])


@pytest.mark.parametrize(
    "calls",
    [
        [],
        [TOGGLED, answered("get", 2, 5, V1)],
        [TOGGLED, answered("toggle", 2, 3, V2), answered("get", 4, 5, V3)],
        [UNANSWERED, answered("get", 4, 5, V1)],
        [UNANSWERED, answered("get", 4, 5, V2)],
        [UNANSWERED, answered("toggle", 2, 5, V2), UNANSWERED],
        [replace(UNANSWERED, latest=math.inf), answered("get", 4, 5, V1), answered("get", 6, 7, V2)],
        [DELETED, answered("create", 4, 5, Absent.NOT_YET, sent={"title": "a"}), answered("get", 6, 7, Absent.GONE)],
        [DELETED, answered("toggle", 2, 3, Absent.GONE), answered("toggle", 1, 3, V1, condition=2)],
        [answered("patch", 2, 3, V1, sent={"completed": False}), answered("get", 4, 5, V1, condition=1)],
        [replace(CREATED, status=0, row=None, version=None, latest=1), answered("get", 0, 1, Absent.NOT_YET)],
    ],
)
def test_a_possible_history_is_explained(calls: list[Call]) -> None:
    assert explain([CREATED, *calls])


def random_history(chance: random.Random, count: int) -> list[Call]:
    """Return a random history. Some responses show an earlier state, so it may be just possible or just impossible."""
    state: Task | Absent = Absent.NOT_YET
    calls, states = [], [state]
    for moment in range(count):
        verb = chance.choice(["create", "get", "patch", "toggle", "toggle", "delete"] if moment else ["create"])
        sent = {"title": "a"} if verb == "create" else {"completed": True} if verb == "patch" else {}
        span = moment - chance.uniform(0, 2), moment + chance.uniform(0, 2)
        call = answered(verb, *span, chance.choice([state, state, state, chance.choice(states)]), sent=sent)
        if chance.random() < 0.7:
            _, _, state = expected(state, call)
            states.append(state)
        if chance.random() < 0.4:
            call = replace(call, status=503, row=None, version=None, latest=span[1] + chance.choice([0, 1, math.inf]))
        calls.append(call)
    return calls


def explained_by_some_permutation(calls: Sequence[Call]) -> bool:
    """Return whether any order explains the calls, by trying all of them."""
    with_response = [call for call in calls if call.answered]
    without_response = [call for call in calls if not call.answered]
    return any(
        explained_by(order)
        for count in range(len(without_response) + 1)
        for taken in itertools.combinations(without_response, count)
        for order in itertools.permutations([*with_response, *taken])
    )


def explained_by(order: Sequence[Call]) -> bool:
    """Return whether this order explains the calls."""
    state: Task | Absent = Absent.NOT_YET
    now = -math.inf
    for call in order:
        now = max(now, call.started)
        again = answered(call.verb, call.started, call.ended, state, sent=call.sent, condition=call.condition)
        if now > (call.ended if call.answered else call.latest) or (call.answered and again != replace(call)):
            return False
        _, _, state = expected(state, call)
    return True


def test_the_search_agrees_with_trying_all_orders() -> None:
    chance = random.Random(1)
    verdicts: Counter[bool] = Counter()
    for _ in range(1500):
        calls = random_history(chance, chance.randint(2, 6))
        chance.shuffle(calls)
        try:
            explain(calls)
            verdict = True
        except UnexplainedError:
            verdict = False
        assert verdict == explained_by_some_permutation(calls), calls
        verdicts[verdict] += 1
    assert min(verdicts.values()) > 200, verdicts
