"""The settings: their sources, their defaults, and one line about an invalid value."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from tests.support.environment import ROOT, environment
from tests.support.processes import free_port
from todo_api import config, startup

PASSWORD = "h-u-s-h"
PROGRAMS = {
    "python wsgi.py": ["wsgi.py"],
    "gunicorn wsgi:app": ["-m", "gunicorn", "-b", "127.0.0.1:0", "wsgi:app"],
    "flask migrate": ["-m", "flask", "--app", "wsgi", "migrate"],
}
INVALID = [
    ("PORT", "abc"),
    ("PORT", "0"),
    ("PORT", "99999"),
    ("HOST", "not-an-address"),
    ("WEB_CONCURRENCY", "x"),
    ("DATABASE_URL", f"mysql://user:{PASSWORD}@host/name"),
    ("DATABASE_URL", f"postgresql://user:{PASSWORD}@[bad"),
    ("DATABASE_URL", f"postgresql://user:{PASSWORD}@host/name?sslmod=require"),
    ("DATABASE_URL", f"postgresql://user:{PASSWORD}@127.0.0.1:99999/name"),
    ("MAX_BODY_BYTES", "1"),
    ("USER_ID", "x" * 256),
    ("CORS_ORIGINS", "app.example"),
    ("ALLOW_ANONYMOUS", "maybe"),
    ("TRUSTED_HOSTS", "https://todo.example.com"),
    ("AUTH_JWKS", "http://auth.example/jwks"),
    ("METRICS_PORT", "http"),
    ("LOG_LEVEL", "loud"),
]
ALSO_INVALID = [  # the same function rejects them, so one process is enough
    ("METRICS_PORT", "0"),
    ("METRICS_PORT", "65536"),
    ("METRICS_PORT", "8000"),  # PORT
    ("DRAIN_SECONDS", "-1"),
    ("DRAIN_SECONDS", "3601"),
    ("DRAIN_SECONDS", "1.5"),
    ("LOG_FORMAT", "xml"),
    ("LOG_FORMAT", "JSON"),
    ("LOG_LEVEL", "notset"),
    ("LOG_LEVEL", "10"),
    ("URL_PREFIX", "todo"),
    ("URL_PREFIX", "/"),
    ("URL_PREFIX", "/todo/"),
    ("URL_PREFIX", "//todo"),
    ("URL_PREFIX", "/to do"),
    ("URL_PREFIX", "/todo/../x"),
    ("URL_PREFIX", "/todo?x"),
    ("URL_PREFIX", "https://example.com/todo"),
    ("URL_PREFIX", "/" + "x" * 100),
    ("SCRIPT_NAME", "todo"),
    ("SCRIPT_NAME", "/todo/"),
    ("DATABASE_URL", f"postgresql://user:{PASSWORD}%@host/name"),
    ("DATABASE_URL", f"postgresql://user:{PASSWORD}/@host/name"),
    ("DATABASE_URL", f"postgresql://user:{PASSWORD}@@host/name"),
    ("DATABASE_URL", f"postgresql://user:{PASSWORD} @host/name"),
    ("DATABASE_URL", f"postgresql://user:{PASSWORD}@[::1]5432/name"),
    ("DATABASE_URL", f"host=127.0.0.1 password={PASSWORD}"),
    ("DATA_DIR", "~nobody-of-this-name/data"),
    ("DATA_DIR", "two\nlines"),
    ("HOST", "127.0.0.1:8000"),
    ("CORS_ORIGINS", "http://[::1]:3000"),  # Flask-CORS would read it as a pattern
    ("CORS_ORIGINS", "https://app.example.com/"),
    ("WEB_CONCURRENCY", "0"),
    ("WEB_THREADS", "257"),
    ("MAX_BODY_BYTES", "1e6"),
    ("USER_ID", "\udcff"),
    ("USER_ID", "two\nlines"),
    ("CORS_ORIGINS", "https://app.example/"),
    ("CORS_ORIGINS", "https://app.example/page"),
    ("CORS_ORIGINS", "https://App.example"),
    ("CORS_ORIGINS", "https://app.example,"),
    ("CORS_ORIGINS", "https://app.example;https://other.example"),
    ("CORS_ORIGINS", "https://*.example"),
    ("CORS_ORIGINS", "https://user@app.example"),
    ("CORS_ORIGINS", "https://app.example\n"),
    ("CORS_ORIGINS", ".*"),
    ("CORS_ORIGINS", "null"),
    ("TRUSTED_HOSTS", "todo.example.com:443"),
    ("TRUSTED_HOSTS", "todo.example.com/"),
    ("TRUSTED_HOSTS", "todo.example.com,"),
    ("TRUSTED_HOSTS", "todo.example.com;other.example"),
    ("TRUSTED_HOSTS", "todo.example.com other.example"),
    ("TRUSTED_HOSTS", "todo.example.com.."),
    ("TRUSTED_HOSTS", "*"),
    ("TRUSTED_HOSTS", "*.example.com"),
    ("TRUSTED_HOSTS", ".example.com"),
    ("TRUSTED_HOSTS", "user@example.com"),
    ("TRUSTED_HOSTS", "t\u00f6do.example"),  # a browser sends xn--tdo-sna.example
    ("TRUSTED_HOSTS", "x" * 254),
    ("TRUSTED_HOSTS", "127.1"),  # browsers send 127.0.0.1
    ("TRUSTED_HOSTS", "256.0.0.1"),
    ("TRUSTED_HOSTS", "10.0.0.0/8"),
    ("TRUSTED_HOSTS", "[fd00::5]:443"),
    ("TRUSTED_HOSTS", "[fd00::5"),
    ("TRUSTED_HOSTS", "fe80::5%eth0"),
    ("AUTH_ISSUER", "https://auth.example"),  # without the other two
    ("AUTH_AUDIENCE", "https://todo.example"),
    ("AUTH_JWKS", "https://auth.example/jwks"),
]
TOKENS = {
    "AUTH_JWKS": "https://auth.example/jwks",
    "AUTH_ISSUER": "https://auth.example",
    "AUTH_AUDIENCE": "https://todo.example",
}
INVALID_FOR_TOKENS = [
    *(("AUTH_JWKS", f"http://{host}/jwks") for host in ("auth.example", "10.0.0.1", "128.0.0.1", "127.0.0.1.example")),
    *(("AUTH_JWKS", f"http://{host}/jwks") for host in ("[::2]", "localhost.example", "2130706433", "127.1")),
    *(("AUTH_JWKS", f"{scheme}://auth.example/jwks") for scheme in ("ftp", "HTTPS", "file", "")),
    *(("AUTH_JWKS", f"https://{PASSWORD}@auth.example/{end}") for end in ("", "jwks")),
    *(("AUTH_JWKS", f"https://user:{PASSWORD}@localhost{end}") for end in ("", "/jwks")),
    *(
        ("AUTH_JWKS", f"https://{rest}")
        for rest in ("", "/jwks", "a b/", "auth.example:0/", "auth.example:99999/", "[x]/")
    ),
    *(("AUTH_JWKS", f"https://auth.example/{end}") for end in ("#keys", "jw ks", "\n", "ä")),
    ("AUTH_JWKS", "~nobody-of-this-name/keys"),
    ("AUTH_JWKS", "keys\udcff"),
    ("AUTH_ISSUER", "two\nlines"),
    ("AUTH_ISSUER", "\udcff"),
    ("AUTH_AUDIENCE", "two\nlines"),
    *((name, "") for name in TOKENS),
    *((name, "  ") for name in TOKENS),
]
VALID_FOR_TOKENS = [
    *(
        "https://auth.example",
        "https://auth.example:8443/a/jwks?x=1",
        "https://10.0.0.1/jwks",
        "https://[2001:db8::1]/",
    ),
    *("http://localhost:3000/jwks", "http://127.0.0.1/jwks", "http://127.8.9.1:1/", "http://[::1]:3000/jwks"),
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a copy of the project, in which a test can write a .env file."""
    for name in ("todo_api", "sql"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "wsgi.py", tmp_path)
    return tmp_path


def settings(project: Path, **variables: str) -> config.Settings:
    """Return the settings that the service reads in a new process."""
    script = (
        "import dataclasses, json, todo_api.config as c; print(json.dumps(dataclasses.asdict(c.load()), default=str))"
    )
    done = run(project, ["-c", script], **variables)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    lists = {name: tuple(values[name]) for name in ("cors_origins", "trusted_hosts")}
    return config.Settings(**(values | lists | {"data_dir": Path(values["data_dir"])}))


def run(project: Path, arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a project folder and wait for its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_an_invalid_value_stops_each_program_with_one_line_that_names_the_setting(
    name: str, value: str, tmp_path: Path
) -> None:
    programs = dict(PROGRAMS)
    if name == "WEB_CONCURRENCY":
        del programs["gunicorn wsgi:app"]  # gunicorn rejects it with its own traceback first
    variables = environment(**{"DATA_DIR": tmp_path / "data", "PORT": free_port(), name: value})
    running = {
        program: subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for program, arguments in programs.items()
    }
    for program, process in running.items():
        errors = process.communicate(timeout=120)[1].decode()
        assert process.returncode not in {0, None}, program
        lines = [line for line in errors.splitlines() if line.startswith("todo_api: ")]
        assert len(lines) == 1, errors
        assert name in lines[0]
        assert "Traceback" not in errors
        assert PASSWORD not in errors
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("name", "value"), ALSO_INVALID)
def test_an_invalid_value_is_reported_in_one_line(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as raised:
        startup.load_settings()
    errors = capsys.readouterr().err
    assert raised.value.code == 3
    assert errors.count("\n") == 1
    assert name in errors
    assert PASSWORD not in errors


@pytest.mark.parametrize(("name", "value"), INVALID_FOR_TOKENS)
def test_an_invalid_setting_for_tokens_is_reported_in_one_line(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for other, valid in TOKENS.items():
        monkeypatch.setenv(other, valid)
    test_an_invalid_value_is_reported_in_one_line(name, value, monkeypatch, capsys)


@pytest.mark.parametrize("url", VALID_FOR_TOKENS)
def test_the_url_of_a_key_set_is_https_or_of_a_loopback_address(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TOKENS | {"AUTH_JWKS": url}).items():
        monkeypatch.setenv(name, value)
    read = config.load()
    assert [read.auth_jwks, read.auth_issuer, read.auth_audience] == [url, *list(TOKENS.values())[1:]]


@pytest.mark.parametrize("path", ["keys.json", "~/keys.json", "/etc/todo/keys.json"])
def test_the_key_set_may_be_a_file(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TOKENS | {"AUTH_JWKS": path}).items():
        monkeypatch.setenv(name, value)
    assert config.load().auth_jwks == str(ROOT / Path(path).expanduser())


def test_dotenv_is_read_and_the_environment_overrides_it(project: Path) -> None:
    (project / ".env").write_text("PORT=8001\nUSER_ID=somebody\n")
    found = settings(project, PORT="8002")
    assert (found.port, found.user_id) == (8002, "somebody")


def test_an_invalid_value_in_dotenv_stops_the_start(project: Path) -> None:
    (project / ".env").write_text("PORT=http\n")
    done = run(project, ["wsgi.py"])
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "PORT" in done.stderr


def test_a_dotenv_that_is_not_utf_8_is_reported_in_one_line(project: Path) -> None:
    (project / ".env").write_bytes(b"USER_ID=\xff\n")
    done = run(project, ["wsgi.py"])
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert ".env" in done.stderr


def test_a_folder_in_place_of_dotenv_is_reported_in_one_line(project: Path) -> None:
    (project / ".env").mkdir()
    done = run(project, ["wsgi.py"])
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert ".env cannot be read: it is a folder" in done.stderr


def test_an_empty_value_means_the_default(project: Path) -> None:
    names = [field.name.upper() for field in fields(config.Settings)]
    (project / ".env").write_text("".join(f"{name}=\n" for name in names))
    defaults = settings(project, **dict.fromkeys(names, " "))
    assert defaults == settings(project, **dict.fromkeys(names, ""))
    assert defaults.port == config.Settings.port
    assert defaults.database_role == ""  # the one exception


def test_the_example_lists_every_setting_with_its_default(project: Path) -> None:
    defaults = settings(project)
    shutil.copy(ROOT / ".env.example", project / ".env")
    assert settings(project) == defaults
    lines = (ROOT / ".env.example").read_text().splitlines()
    shown = [line.partition("=")[0] for line in lines if line and not line.startswith("#")]
    assert shown == [field.name.upper() for field in fields(config.Settings)]


def test_the_defaults_are_those_of_the_settings_class(project: Path) -> None:
    found = asdict(settings(project))
    workers = found.pop("web_concurrency")  # one per core
    assert 1 <= workers <= 8
    expected = asdict(config.Settings()) | {"data_dir": project / ".data"}
    del expected["web_concurrency"]
    assert found == expected


def test_origins_are_separated_by_commas(project: Path) -> None:
    assert settings(project).cors_origins == ()
    found = settings(project, CORS_ORIGINS="https://app.example,http://localhost:3000")
    assert found.cors_origins == ("https://app.example", "http://localhost:3000")


def test_trusted_hosts_are_separated_by_commas_and_compared_in_one_form(project: Path) -> None:
    assert settings(project).trusted_hosts == ()
    found = settings(project, TRUSTED_HOSTS="Todo.example.com., todo_api,10.0.0.5,[FD00:0::5],fd00::6,xn--tdo-sna.1a")
    assert found.trusted_hosts == ("todo.example.com", "todo_api", "10.0.0.5", "fd00::5", "fd00::6", "xn--tdo-sna.1a")


def test_a_relative_data_dir_is_in_the_project_and_a_tilde_is_the_home_folder(project: Path) -> None:
    assert settings(project, DATA_DIR="data").data_dir == project / "data"
    assert settings(project, DATA_DIR="~/data", HOME="/home/me").data_dir == Path("/home/me/data")


def test_only_one_of_the_two_prefixes_can_be_set(project: Path) -> None:
    done = run(project, ["wsgi.py"], URL_PREFIX="/todo", SCRIPT_NAME="/todo")
    assert (done.returncode, done.stderr.count("\n")) == (3, 1)
    assert "URL_PREFIX and SCRIPT_NAME are both set" in done.stderr


@pytest.mark.parametrize("name", [".env", ".flaskenv"])
@pytest.mark.parametrize("folder", ["outer", "outer/project/inner"], ids=["parent folder", "current folder"])
def test_the_dotenv_of_another_project_is_not_read(project: Path, folder: str, name: str) -> None:
    inner = project / "outer" / "project" / "inner"
    inner.mkdir(parents=True)
    for part in ("todo_api", "sql", "wsgi.py"):
        (project / part).rename(inner.parent / part)
    (project / folder / name).write_text("DATABASE_URL=wrong\nPORT=wrong\nPGHOST=wrong\nUSER_ID=stranger\n")
    # The environment of the process still counts, even for a value that the file has too.
    (inner.parent / ".env").write_text("HOST=::1\n")
    script = "import os, todo_api.config as c; s = c.load(); print(s.host, s.user_id, s.port, os.environ.get('PGHOST'))"
    (inner.parent / "probe.py").write_text(f"import sys; sys.path.insert(0, '..'); {script}; from wsgi import app\n")
    done = run(inner, ["-m", "flask", "--app", "../probe", "openapi", "print"], USER_ID="stranger")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("::1 stranger 8000 None\n")
