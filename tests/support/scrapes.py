"""Scrapes of METRICS_PORT."""

from collections import Counter
from collections.abc import Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support.service import Service

REQUESTS = "todo_api_http_requests_total"
DURATIONS = "todo_api_http_request_duration_seconds"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def url_of(service: Service, port: int) -> str:
    """Return the URL of a service's metrics."""
    return f"{service.url.rpartition(':')[0]}:{port}/metrics"


def scrape(url: str) -> Samples:
    """Return all samples, by their names and labels."""
    response = httpx.get(url, timeout=60)
    assert response.status_code == httpx.codes.OK, response.text
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = text_string_to_metric_families(response.text)
    return {(sample.name, frozenset(sample.labels.items())): sample.value for f in families for sample in f.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    """Return the sum of the samples of a name that have these labels."""
    return sum(v for (found, given), v in samples.items() if found == name and labels.items() <= dict(given).items())


def requests(samples: Samples) -> Counter[tuple[str, str, int]]:
    """Return how many requests there were, by method, route and status."""
    found: Counter[tuple[str, str, int]] = Counter()
    for (name, labels), count in samples.items():
        if name == REQUESTS:
            label: Mapping[str, str] = dict(labels)
            found[label["method"], label["route"], int(label["status"])] += int(count)
    return found
