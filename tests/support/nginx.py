"""nginx with .deploy/nginx.conf, in front of services."""

import ssl
import subprocess
from pathlib import Path

import httpx

from tests.support.environment import ROOT
from tests.support.fixtures import Start
from tests.support.optional_tools import program
from tests.support.processes import free_port
from tests.support.service import Service

SELF_SIGNED = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x -addext"
# The rest of the configuration, as in a distribution's nginx.conf. All files are in the test's folder, which only its
# owner may enter.
INSTANCE = "server 127.0.0.1:8000 max_fails=0;"
AROUND = """user root; pid pid; events {{}}
http {{
    access_log off; client_body_temp_path body; proxy_temp_path proxy;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    {more} {file}
}}"""


def start_nginx(start: Start, folder: Path, *behind: Service, more: str = "") -> Service:
    """Start nginx in front of a service or several, with .deploy/nginx.conf and ``more`` configuration."""
    certificate, key, port = folder / "certificate", folder / "key", free_port()
    file = (ROOT / ".deploy" / "nginx.conf").read_text(encoding="utf-8")
    for theirs, ours in (
        ("/etc/ssl/certs/tasks.example.com.pem", certificate.name),
        ("/etc/ssl/private/tasks.example.com.key", key.name),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl sndbuf=32k"),  # a small buffer, as on a slow network
        (INSTANCE, "\n".join(INSTANCE.replace("8000", str(service.port)) for service in behind)),
    ):
        assert file.count(theirs) == 1, theirs
        file = file.replace(theirs, ours)
    (folder / "nginx.conf").write_text(AROUND.format(more=more, file=file), encoding="utf-8")
    made = [*SELF_SIGNED.split(), "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([program("openssl"), *made], check=True, capture_output=True)
    command = [program("nginx"), "-p", str(folder), "-c", "nginx.conf", "-e", "stderr", "-g", "daemon off;"]
    nginx = start(command=command, PORT=port)
    nginx.url = f"https://127.0.0.1:{port}"
    nginx.client = httpx.Client(base_url=nginx.url, timeout=20, verify=tls(nginx))
    return nginx.wait()


def tls(nginx: Service) -> ssl.SSLContext:
    """Return a TLS context that trusts only the certificate of this nginx."""
    return ssl.create_default_context(cafile=nginx.log_file.with_name("certificate"))
