"""Calls succeed on a database whose default isolation level is stricter than READ COMMITTED."""

from collections import Counter
from pathlib import Path

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from tests.support.databases import as_url, new_database
from tests.support.load import at_once
from tests.support.service import Service


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_toggle_counts_every_concurrent_call_at_a_stricter_isolation_level(
    conninfo: str, tmp_path: Path, isolation: str
) -> None:
    with new_database(conninfo) as database:
        with psycopg.connect(database, autocommit=True) as db:
            set_default = SQL("ALTER DATABASE {} SET default_transaction_isolation = {}")
            db.execute(set_default.format(Identifier(db.info.dbname), isolation))
        service = Service(tmp_path / "log", DATABASE_URL=as_url(database)).wait()
        path = f"/api/tasks/{service.client.post('/api/tasks', json={'title': 'x'}).json()['id']}"
        responses = at_once(service, 51, lambda client, _: client.post(f"{path}/toggle"))
        assert Counter(response.status_code for response in responses) == {200: 51}
        assert service.client.get(path).json()["version"] == 52
        assert service.stop() == 0
