"""Reads the settings from the environment and from .env, and checks them. No other module reads the environment."""

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from urllib.parse import urlsplit

from dotenv import dotenv_values, find_dotenv, load_dotenv
from environs import Env, ValidationError, validate
from environs.exceptions import EnvError

VERSION = "1.0.0"  # of the API and the service
ROOT = Path(__file__).resolve().parent.parent
NUMBERS = range(1, 257)  # of workers, and of threads
LOG_LEVELS = ("debug", "info", "warning", "error")

# PostgreSQL writes the times in its JSON in the time zone of the session. libpq sends PGTZ when it connects. So no
# statement is needed, and a pooler in transaction mode accepts it.
os.environ["PGTZ"] = "UTC"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings, which .env.example describes.

    The defaults of the fields are those of the environment variables, with one exception: if WEB_CONCURRENCY is not
    set, ``load`` returns one worker per core, at most 8.
    """

    database_url: str = ""
    database_pooler: bool = False
    database_role: str = "todo_app"
    migration_database_url: str = ""
    data_dir: Path = ROOT / ".data"
    postgres_bin: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int | None = None
    drain_seconds: int = 0
    log_format: str = "text"
    log_level: str = "info"
    web_concurrency: int = 1
    web_threads: int = 4
    user_id: str = "local"
    auth_jwks: str = ""  # a URL, or the absolute path of a file
    auth_issuer: str = ""
    auth_audience: str = ""
    allow_anonymous: bool = False
    trusted_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 64 * 1024
    cors_origins: tuple[str, ...] = ()
    url_prefix: str = ""
    script_name: str = ""

    @property
    def local_only(self) -> bool:
        """Return whether only programs on this machine are served, because nothing asks who is calling."""
        return not (self.auth_jwks or self.allow_anonymous)


class StartError(Exception):
    """The service cannot start. The message is for the person who starts it, and may have several lines."""


def load() -> Settings:
    """Return the settings from the environment and .env.

    Raises:
        StartError: a setting is invalid, or .env cannot be read.

    """
    try:
        return _read()
    except EnvError as error:
        raise StartError(error) from error
    except (OSError, ValueError) as error:
        raise StartError(f"{ROOT / '.env'} cannot be read: {error}") from error


def _read() -> Settings:
    _forget_other_dotenv()
    if (ROOT / ".env").is_dir():  # as Docker creates it for a volume whose source is missing
        raise IsADirectoryError("it is a folder")
    # load_dotenv puts the values of .env into the environment. So the loop below handles empty values from both.
    load_dotenv(ROOT / ".env")
    env = Env()
    for name in map(str.upper, Settings.__dataclass_fields__):
        if name != "DATABASE_ROLE" and not os.environ.get(name, "unset").strip():
            del os.environ[name]  # an empty value, such as "PORT=", means the default
    if "URL_PREFIX" in os.environ and "SCRIPT_NAME" in os.environ:
        raise StartError(
            "URL_PREFIX and SCRIPT_NAME are both set: set URL_PREFIX if the proxy removes the prefix from the URL, and "
            "SCRIPT_NAME if it does not"
        )
    _check_tokens()
    _use_system_certificates()
    settings = Settings(
        database_url=env.str("DATABASE_URL", Settings.database_url, validate=_check_database_url),
        database_pooler=env.bool("DATABASE_POOLER", Settings.database_pooler),
        database_role=env.str("DATABASE_ROLE", Settings.database_role, validate=[_check_text, _check_role]).strip(),
        migration_database_url=env.str("MIGRATION_DATABASE_URL", "", validate=_check_database_url),
        # A relative path is relative to the project, not to the current folder.
        data_dir=ROOT / env.path("DATA_DIR", Settings.data_dir, validate=_check_path).expanduser(),
        postgres_bin=_folder(env.path("POSTGRES_BIN", None, validate=_check_path)),
        host=env.str("HOST", Settings.host, validate=_check_address),
        port=env.int("PORT", Settings.port, validate=_check_port),
        metrics_port=env.int("METRICS_PORT", None, validate=_check_port),
        drain_seconds=env.int("DRAIN_SECONDS", Settings.drain_seconds, validate=validate.Range(0, 3600)),
        log_format=env.str("LOG_FORMAT", Settings.log_format, validate=validate.OneOf(["text", "json"])),
        log_level=env.str("LOG_LEVEL", Settings.log_level, validate=_check_level).lower(),
        web_concurrency=env.int("WEB_CONCURRENCY", _default_concurrency(), validate=_check_number),
        web_threads=env.int("WEB_THREADS", Settings.web_threads, validate=_check_number),
        user_id=env.str("USER_ID", Settings.user_id, validate=[validate.Length(1, 255), _check_text]),
        auth_jwks=_key_set(env.str("AUTH_JWKS", "", validate=_check_key_set)),
        auth_issuer=env.str("AUTH_ISSUER", "", validate=_check_text),
        auth_audience=env.str("AUTH_AUDIENCE", "", validate=_check_text),
        allow_anonymous=env.bool("ALLOW_ANONYMOUS", Settings.allow_anonymous),
        trusted_hosts=_hosts(env.str("TRUSTED_HOSTS", "", validate=_check_hosts)),
        max_body_bytes=env.int("MAX_BODY_BYTES", Settings.max_body_bytes, validate=validate.Range(1024, 2**30)),
        cors_origins=_origins(env.str("CORS_ORIGINS", "", validate=_check_origins)),
        url_prefix=env.str("URL_PREFIX", "", validate=_check_prefix),
        script_name=env.str("SCRIPT_NAME", "", validate=_check_prefix),
    )
    if settings.metrics_port == settings.port:
        raise StartError("METRICS_PORT and PORT must be different ports")
    return settings


def _check_role(name: str) -> None:
    if name.strip() == "none" or len(name.encode()) > _MAX_NAME_LENGTH:
        raise ValidationError(f"It must be the name of a role, of at most {_MAX_NAME_LENGTH} bytes, or empty.")


_MAX_NAME_LENGTH = 63  # bytes; PostgreSQL cuts longer names
_check_number = validate.Range(NUMBERS.start, NUMBERS.stop - 1)
_check_port = validate.Range(1, 65_535)


def _check_level(level: str) -> None:
    if level.lower() not in LOG_LEVELS:
        raise ValidationError(f"It must be {', '.join(LOG_LEVELS[:-1])} or {LOG_LEVELS[-1]}.")


def wants_json_logs() -> bool:
    """Return whether LOG_FORMAT is json. Once .env was read, this also works if another setting is invalid."""
    return os.environ.get("LOG_FORMAT") == "json"


def take_variable(name: str) -> str:
    """Return the value of an environment variable that is no setting, and remove it. '' if it is not there."""
    return os.environ.pop(name, "")


# Matches the URLs that libpq accepts, except those for which libpq's error message would show the password: with an
# unescaped @, / or % in the password, or with brackets that do not contain an IPv6 address.
_CHARACTER = r"(?:[^][@/?%\s\ud800-\udfff]|%(?!00)[0-9A-Fa-f]{2})"
_DATABASE_URL = re.compile(
    rf"postgres(ql)?://(({_CHARACTER}|[][?])*@)?(\[[0-9A-Fa-f:.]+\](?=[:,/?]|$)|{_CHARACTER})*([/?]({_CHARACTER}|[][/?])*)?"
)


def _check_database_url(url: str) -> None:
    if not _DATABASE_URL.fullmatch(url):
        # The message does not show the value, because it may contain a password.
        raise ValidationError("It must be like postgresql://user:password@host/name, with %40 for @ in the password.")


def _check_address(host: str) -> None:
    try:
        ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise ValidationError("It must be localhost or an IP address, such as 127.0.0.1, 0.0.0.0 or ::.") from error


def normal_host(host: str) -> str:
    """Return a host's name in lower case and without a dot at its end, or its address in one form for all spellings.

    As in a URL, an IPv6 address may be in brackets.
    """
    name = host.lower().removesuffix(".")
    address = _address(name[1:-1] if re.fullmatch(r"\[.*:.*\]", name) else name)
    return str(address) if address else name


def is_loopback(host: str) -> bool:
    """Return whether a host is localhost or a loopback address."""
    address = _address(host)
    return address.is_loopback if address else host == "localhost"


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address  # ::ffff:127.0.0.1 is 127.0.0.1


_MAX_HOST_LENGTH = 253
# The last label of a name has a letter: a browser takes 127.1 for an address.
_HOST_NAME = re.compile(r"([a-z0-9_-]+\.)*[0-9-]*[a-z_][a-z0-9_-]*")


def _hosts(listed: str) -> tuple[str, ...]:
    return tuple(normal_host(host.strip(" ")) for host in listed.split(",")) if listed else ()


def _check_hosts(listed: str) -> None:
    for host in _hosts(listed):
        is_valid = _HOST_NAME.fullmatch(host) or (_address(host) and "%" not in host)
        if not is_valid or len(host) > _MAX_HOST_LENGTH:
            raise ValidationError("Each must be the name or the address of a host, without a port.")


def _check_path(path: Path) -> None:
    if len(str(path).splitlines()) > 1:
        raise ValidationError("It must not contain a line break.")  # files of PostgreSQL list paths, one in a line
    try:
        path.expanduser()
    except RuntimeError as error:  # "~name" for an unknown user
        raise ValidationError(f"{error}") from error


def _folder(path: Path | None) -> Path | None:
    return path and ROOT / path.expanduser()


_TOKENS = ("AUTH_JWKS", "AUTH_ISSUER", "AUTH_AUDIENCE")
# No user and no fragment. A key set is public, so its URL needs no password.
_KEY_SET_URL = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[!-\"$-~]*)?")


def _check_tokens() -> None:
    missing = [name for name in _TOKENS if name not in os.environ]
    if missing and len(missing) < len(_TOKENS):
        raise StartError(f"{', '.join(_TOKENS)} must be set together; missing: {', '.join(missing)}")


def _is_url(key_set: str) -> bool:
    return "://" in key_set


def _check_key_set(key_set: str) -> None:
    if not _is_url(key_set):
        _check_text(key_set)
        _check_path(Path(key_set))
        return
    # The messages do not show the value, because it may contain a password.
    if not _KEY_SET_URL.fullmatch(key_set) or not _has_port(key_set):
        raise ValidationError("It must be a URL such as https://auth.example.com/api/auth/jwks, or the path of a file.")
    if key_set.startswith("http:") and not _is_loopback(urlsplit(key_set).hostname or ""):
        raise ValidationError("It must begin with https://, unless the host is localhost or another loopback address.")


def _has_port(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    try:
        return ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        return False


def _key_set(given: str) -> str:
    # A relative path is relative to the project, as that of DATA_DIR is.
    return given if _is_url(given) or not given else str(ROOT / Path(given).expanduser())


_MAX_PREFIX_LENGTH = 100
_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|\*")  # no brackets: Flask-CORS would take them for a pattern


def _origins(listed: str) -> tuple[str, ...]:
    return tuple(origin.strip(" ") for origin in listed.split(",")) if listed else ()


def _check_origins(listed: str) -> None:
    for origin in _origins(listed):
        if not _ORIGIN.fullmatch(origin):
            raise ValidationError("Each must be an origin such as https://app.example.com, in lower case, or *.")


def _check_prefix(prefix: str) -> None:
    if not re.fullmatch(r"(/(?!\.\.?(/|$))[A-Za-z0-9._~-]+){1,20}", prefix) or len(prefix) > _MAX_PREFIX_LENGTH:
        raise ValidationError(
            f"It must be a path such as /todo, without a slash at its end, of at most {_MAX_PREFIX_LENGTH} characters."
        )


def _check_text(text: str) -> None:
    if not text.isprintable():
        raise ValidationError("It must be printable text, in UTF-8.")


def _forget_other_dotenv() -> None:
    """Remove the variables that the command ``flask`` has read from the .env of another project.

    Before it imports the application, it reads .env and .flaskenv in the current folder or the nearest parent folder
    that has them. No setting in a file prevents that.
    """
    if "FLASK_RUN_FROM_CLI" not in os.environ or os.environ.get("FLASK_SKIP_DOTENV"):
        return
    files = {find_dotenv(name, usecwd=True) for name in (".flaskenv", ".env")} - {"", str(ROOT / ".env")}
    others = {name: value for file in sorted(files) for name, value in dotenv_values(file).items()}
    if not others:
        return
    try:
        initial = {entry.partition(b"=")[0] for entry in Path("/proc/self/environ").read_bytes().split(b"\0")}
    except OSError as error:  # not Linux
        raise EnvError(f"flask has read {' and '.join(sorted(files))}: set FLASK_SKIP_DOTENV=1") from error
    for name, value in others.items():
        if os.fsencode(name) not in initial and os.environ.get(name) == value:
            del os.environ[name]


# The files in which distributions keep the certificates that they trust: Debian, Fedora, openSUSE, Alpine.
_CERTIFICATES = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
]


def _use_system_certificates() -> None:
    """Set SSL_CERT_FILE, if it is not set, so that sslrootcert=system works.

    The OpenSSL in psycopg's package looks for the system's certificates in a folder that no distribution uses.
    """
    if not os.environ.keys() & {"SSL_CERT_FILE", "SSL_CERT_DIR"}:
        known = [ssl.get_default_verify_paths().cafile or "", *_CERTIFICATES]
        if found := next(filter(os.path.isfile, known), None):
            os.environ["SSL_CERT_FILE"] = found


def _default_concurrency() -> int:
    # One worker per core, because the threads of a process share one interpreter lock. At most 8, because a small
    # database accepts few connections.
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


def drop_libpq_variables() -> None:
    """Remove PGHOST, PGPORT and the other libpq variables except PGTZ: they describe another server."""
    for name in [name for name in os.environ if name.startswith("PG") and name != "PGTZ"]:
        del os.environ[name]


def set_libpq_variables(variables: Mapping[str, str]) -> None:
    """Set environment variables of libpq. A child process such as psql inherits them."""
    os.environ.update(variables)
