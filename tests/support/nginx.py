"""nginx in front of two instances of the service."""

import signal

from tests.docs.test_readme import UPSTREAM
from tests.support.processes import children, wait_until
from tests.support.service import Service


def name_both(nginx: Service, *ports: int) -> None:
    """Name two instances in the configuration of a running nginx, as the README says, instead of the only one.

    Its port is the first one.
    """
    upstream = UPSTREAM
    for number, port in enumerate(ports, 1):
        assert upstream.count(f"127.0.0.1:800{number} ") == 1
        upstream = upstream.replace(f"127.0.0.1:800{number} ", f"127.0.0.1:{port} ")
    file = nginx.log_file.with_name("nginx.conf")
    text, line = file.read_text(encoding="utf-8"), f"server 127.0.0.1:{ports[0]};"
    assert text.count(line) == 1
    file.write_text(text.replace(line, upstream), encoding="utf-8")
    before = children(nginx.process.pid).keys()
    nginx.process.send_signal(signal.SIGHUP)
    wait_until(lambda: bool(now := children(nginx.process.pid)) and not before & now.keys())
