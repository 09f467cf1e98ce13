"""Races: clients make concurrent calls on a few tasks, and record the calls."""

import math
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from tests.support.histories import Call, Row
from tests.support.service import Service

SILENCE = 0.6  # seconds; if the service waited longer, PostgreSQL may still run the statement
PATHS = {"create": "POST ", "get": "GET /{}", "patch": "PATCH /{}", "toggle": "POST /{}/toggle", "delete": "DELETE /{}"}


@dataclass
class Target:
    """A task that clients race for. Its marker is the first word of its title, and identifies it in lists."""

    marker: str
    keyed: bool = False
    task_id: int | None = None
    version: int = 1
    gone: bool = False


class Race:
    """Clients that make calls on a few tasks, each over its own connections, and the record of their calls."""

    def __init__(self, service: Service, seed: str) -> None:
        """Prepare the race. The service must have no tasks."""
        self.service, self.seed = service, seed
        self.calls: list[tuple[str, Call]] = []
        self.lists: list[tuple[float, float, list[Row]]] = []
        self.targets = [Target("", gone=True) for _ in range(3)]
        self.crashing = threading.Event()  # while set, a call with a 503 may take effect later
        self.stopping = threading.Event()

    def run(self, clients: int, disturb: Callable[[], None]) -> dict[str, list[Call]]:
        """Run the clients until ``disturb`` returns, read all tasks once more, and return the history of each."""
        with ThreadPoolExecutor(clients) as threads:
            runs = [threads.submit(Client(self, number).run) for number in range(clients)]
            try:
                disturb()
            finally:
                self.stopping.set()
        for run in runs:
            run.result()
        Client(self, clients).run()
        return self._histories()

    def _histories(self) -> dict[str, list[Call]]:
        histories = defaultdict(list)
        for marker, call in self.calls:
            histories[marker].append(call)
        spans = {}
        for marker, calls in histories.items():
            ends = [call.ended for call in calls if call.status == 404 or (call.verb, call.status) == ("delete", 200)]
            spans[marker] = min(call.started for call in calls), min(ends, default=math.inf)
        for started, ended, rows in self.lists:
            for row in rows:
                histories[marker_of(row)].append(Call("get", started, ended, 200, row=row, version=row["version"]))
            for marker in set(spans) - set(map(marker_of, rows)):
                # Before the create or after the delete, the list tells nothing new.
                if spans[marker][0] < ended and started < spans[marker][1]:
                    histories[marker].append(Call("get", started, ended, 404))
        return histories


def marker_of(row: Row) -> str:
    """Return the marker of the task in a row."""
    return str(row["title"].split()[0])


class Client:
    """A client. Its calls depend on the seed and on the responses."""

    def __init__(self, race: Race, number: int) -> None:
        """Prepare the client."""
        self.race, self.number, self.random = race, number, random.Random(f"{race.seed} {number}")
        self.created = 0

    def run(self) -> None:
        """Make calls until the race stops, then read the list."""
        while not self.race.stopping.is_set():
            with self._connect() as self.http:  # a new connection from time to time may lead to another worker
                for _ in range(100):
                    if not self.race.stopping.is_set():
                        self._step()
        with self._connect() as self.http:
            while not self._list():
                time.sleep(0.1)

    def _connect(self) -> httpx.Client:
        return httpx.Client(base_url=self.race.service.url, timeout=60, verify=False)

    def _step(self) -> None:
        place = self.random.randrange(len(self.race.targets))
        target = self.race.targets[place]
        verb = self.random.choices(["get", "list", "patch", "toggle", "delete", "create"], [20, 8, 30, 25, 3, 4])[0]
        if target.gone:
            self.created += 1
            target = Target(f"{self.number}.{self.created}", keyed=self.random.random() < 0.7)
            if target.keyed:  # other clients may send the same create, with the same key
                self.race.targets[place] = target
            self._call(target, "create")
            if target.task_id:
                self.race.targets[place] = target
        elif verb == "list":
            self._list()
        elif target.task_id is None or (verb == "create" and target.keyed):
            self._call(target, "create")
        else:
            self._call(target, verb if verb != "create" else "get")

    def _list(self) -> bool:
        started, response, ended = self._request("GET", "/api/tasks")
        if not response or response.status_code == 503:
            return False
        rows = response.json()
        self.race.lists.append((started, ended, rows))
        raced = {target.marker for target in self.race.targets}
        for row in rows:
            if marker_of(row) not in raced and self.random.random() < 0.2:
                self._call(Target(marker_of(row), task_id=row["id"]), "delete")
        return True

    def _call(self, target: Target, verb: str) -> None:
        sent = self._sent(target, verb)
        condition = None
        if verb != "create" and self.random.random() < 0.35:
            condition = max(1, target.version + self.random.choice([-1, 0, 0, 0, 1]))
        headers = {} if condition is None else {"If-None-Match" if verb == "get" else "If-Match": f'"{condition}"'}
        if verb == "create" and target.keyed:
            headers["Idempotency-Key"] = target.marker
        method, _, path = PATHS[verb].format(target.task_id).partition(" ")
        started, response, ended = self._request(
            method, f"/api/tasks{path}", headers=headers, json=sent if verb in ("create", "patch") else None
        )
        status = response.status_code if response else 0
        row = response.json() if response and status in (200, 201) else None
        etag = response.headers.get("ETag", "").strip('"') if response else ""
        known = status == 503 and ended - started < SILENCE and not self.race.crashing.is_set()
        latest = ended if known else math.inf
        call = Call(verb, started, ended, status, sent, condition, row, int(etag) if etag else None, latest)
        self.race.calls.append((target.marker, call))
        target.version = call.version or target.version
        target.task_id = row["id"] if row else target.task_id
        target.gone = target.gone or status == 404 or (verb == "delete" and status == 200)

    def _sent(self, target: Target, verb: str) -> Row:
        if verb == "create":  # the same each time, since a key allows only one body
            return {"title": target.marker, "completed": len(target.marker) % 2 == 0}
        changes = {
            "title": f"{target.marker} {self.random.choice('abc')}",
            "description": self.random.choice([None, "", "x"]),
            "completed": self.random.choice([True, False]),
        }
        return {name: value for name, value in changes.items() if verb == "patch" and self.random.random() < 0.4}

    def _request(self, method: str, path: str, **options: Any) -> tuple[float, httpx.Response | None, float]:
        started = time.monotonic()
        try:
            response = self.http.request(method, path, **options)
        except httpx.TransportError:
            response = None
        return started, response, time.monotonic()
