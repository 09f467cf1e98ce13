"""The OpenAPI document describes the API completely, and its page loads nothing from other servers."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.environment import ROOT, environment
from tests.support.service import Service

CALLS = {
    ("get", "/api/tasks"): {200, 304, 400, 401, 413, 421, 500, 503},
    ("post", "/api/tasks"): {201, 400, 401, 403, 413, 415, 421, 422, 500, 503},
    ("get", "/api/tasks/{task_id}"): {200, 304, 400, 401, 404, 413, 421, 500, 503},
    ("patch", "/api/tasks/{task_id}"): {200, 400, 401, 403, 404, 412, 413, 415, 421, 500, 503},
    ("delete", "/api/tasks/{task_id}"): {200, 400, 401, 403, 404, 412, 413, 421, 500, 503},
    ("post", "/api/tasks/{task_id}/toggle"): {200, 400, 401, 403, 404, 412, 413, 421, 500, 503},
}
REQUEST_HEADERS = {
    ("get", "/api/tasks"): {"If-None-Match"},
    ("post", "/api/tasks"): {"Idempotency-Key"},
    ("get", "/api/tasks/{task_id}"): {"If-None-Match"},
    ("patch", "/api/tasks/{task_id}"): {"If-Match"},
    ("delete", "/api/tasks/{task_id}"): {"If-Match"},
    ("post", "/api/tasks/{task_id}/toggle"): {"If-Match"},
}
RESPONSE_HEADERS = {
    304: {"Cache-Control", "ETag", "Link"},
    401: {"WWW-Authenticate"},
    412: {"ETag"},
    503: {"Retry-After"},
}
ASSETS = ["docs/swagger-ui.css", "docs/swagger-ui-bundle.js", "docs/favicon-32x32.png", "docs/page.js"]


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    """Return the OpenAPI document."""
    response = service.client.get("/openapi.json")
    assert (response.status_code, response.headers["Content-Type"]) == (200, "application/json")
    found: dict[str, Any] = response.json()
    return found


def resolve(document: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Return the target of a reference; return any other node as it is."""
    for name in node["$ref"].removeprefix("#/").split("/") if "$ref" in node else []:
        document = document[name]
    return document if "$ref" in node else node


def test_every_call_is_documented_with_every_success_and_failure(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    documented = {
        (method, path): {int(status) for status in operation["responses"]}
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    }
    assert documented == CALLS


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_each_response_has_a_media_type_a_schema_and_an_example(
    document: dict[str, Any], method: str, path: str
) -> None:
    for status, response in document["paths"][path][method]["responses"].items():
        if status == "304":  # it has no body
            assert "content" not in resolve(document, response)
            continue
        content = resolve(document, response)["content"]
        assert list(content) == ["application/json" if int(status) < 400 else "application/problem+json"]
        (media_type,) = content.values()
        schema = resolve(document, media_type["schema"].get("items", media_type["schema"]))
        examples = [example["value"] for example in media_type.get("examples", {}).values()] or [media_type["example"]]
        for example in examples if media_type["schema"].get("type") != "array" else examples[0]:
            assert set(schema["required"]) <= set(example) <= set(schema["properties"])


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_the_headers_of_each_response_are_documented(document: dict[str, Any], method: str, path: str) -> None:
    successes = {
        200: {"Cache-Control", "ETag", *(["Link"] if (method, path) == ("get", "/api/tasks") else [])},
        201: {"Cache-Control", "ETag", "Location"},
    }
    documented = {
        int(status): set(resolve(document, response)["headers"])
        for status, response in document["paths"][path][method]["responses"].items()
    }
    expected = successes | RESPONSE_HEADERS
    assert documented == {status: {"X-Request-ID", *expected.get(status, set())} for status in CALLS[method, path]}


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_the_request_headers_of_each_call_are_documented(document: dict[str, Any], method: str, path: str) -> None:
    parameters = [resolve(document, node) for node in document["paths"][path][method].get("parameters", [])]
    headers = {parameter["name"]: parameter for parameter in parameters if parameter["in"] == "header"}
    assert set(headers) == REQUEST_HEADERS[method, path]
    assert not any(header.get("required") for header in headers.values())


def test_the_parameters_of_the_list_are_documented(document: dict[str, Any]) -> None:
    parameters = [resolve(document, node) for node in document["paths"]["/api/tasks"]["get"]["parameters"]]
    query = {parameter["name"]: parameter for parameter in parameters if parameter["in"] == "query"}
    assert set(query) == {"limit", "after", "completed", "q"}
    assert all(parameter["description"] and not parameter["required"] for parameter in query.values())
    limit = query["limit"]["schema"]
    assert (limit["type"], limit["minimum"], limit["maximum"], limit["default"]) == ("integer", 1, 10_000, 10_000)


def test_bodies_are_documented_with_both_media_types_of_a_patch(document: dict[str, Any]) -> None:
    patch = document["paths"]["/api/tasks/{task_id}"]["patch"]["requestBody"]
    assert set(patch["content"]) == {"application/json", "application/merge-patch+json"}
    assert list(document["paths"]["/api/tasks"]["post"]["requestBody"]["content"]) == ["application/json"]


def test_a_token_is_described_and_optional(document: dict[str, Any]) -> None:
    scheme = document["components"]["securitySchemes"]["bearerAuth"]
    assert (scheme["type"], scheme["scheme"], scheme["bearerFormat"]) == ("http", "bearer", "JWT")
    assert document["security"] == [{}, {"bearerAuth": []}]
    assert not [item for path in document["paths"].values() for item in path.values() if "security" in item]


def test_with_auth_jwks_a_token_is_required_and_the_rest_of_the_document_is_the_same(
    document: dict[str, Any], tmp_path: Path
) -> None:
    settings = environment(AUTH_JWKS="https://auth.example/jwks", AUTH_ISSUER="https://auth.example", AUTH_AUDIENCE="x")
    command = [sys.executable, "-m", "flask", "--app", "wsgi", "openapi", "write", str(tmp_path / "document")]
    subprocess.run(command, cwd=ROOT, env=settings, timeout=60, check=True)
    written = json.loads((tmp_path / "document").read_text(encoding="utf-8"))
    assert written == document | {"security": [{"bearerAuth": []}]}


def test_the_two_problems_of_401_and_503_are_documented(document: dict[str, Any]) -> None:
    responses = document["paths"]["/api/tasks"]["get"]["responses"]
    kinds = {
        status: set(resolve(document, responses[status])["content"]["application/problem+json"]["examples"])
        for status in ("401", "503")
    }
    assert kinds["401"] == {"authentication_required", "invalid_token"}
    assert kinds["503"] == {"database_unavailable", "keys_unavailable"}


def test_the_pattern_of_titles_rejects_exactly_the_whitespace_of_python(document: dict[str, Any]) -> None:
    pattern = document["components"]["schemas"]["NewTask"]["properties"]["title"]["pattern"]
    for code in range(0x3100):
        assert bool(re.search(pattern, chr(code))) != chr(code).isspace(), hex(code)


def test_only_the_description_may_be_null(document: dict[str, Any]) -> None:
    for name in ("Task", "NewTask", "TaskChanges"):
        properties = document["components"]["schemas"][name]["properties"]
        nullable = {member for member, schema in properties.items() if "null" in schema["type"]}
        assert nullable == {"description"}


def test_the_root_redirects_to_the_docs_page(client: httpx.Client) -> None:
    for path in ("/", "/docs/"):
        response = client.get(path)
        assert (response.status_code, response.headers["Location"]) == (302, "/docs")


def test_the_docs_page_links_only_to_files_of_the_service(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    links = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert sorted(links) == sorted([*ASSETS, "openapi.json"])
    for link in links:
        assert client.get(f"/{link}").status_code == 200
    assert "//" not in page.text.replace("<!doctype html>", "")
    assert "openapi.json" in client.get("/docs/page.js").text


def test_the_content_security_policy_forbids_other_origins(client: httpx.Client) -> None:
    policy = dict(
        part.strip().split(" ", 1) for part in client.get("/docs").headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"


@pytest.mark.parametrize("name", ["..%2fflask_swagger_ui.py", "%2e%2e%2fLICENSE", "..%5cx", "%2fetc%2fpasswd"])
def test_no_other_file_is_served_below_docs(client: httpx.Client, name: str) -> None:
    assert client.get(f"/docs/{name}").status_code == 404
