"""gunicorn's threaded worker, changed so that slow clients occupy no thread and a stop loses no request."""

import logging
import select
import selectors
import signal
import socket
import struct
import sys
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from math import inf
from operator import attrgetter
from queue import SimpleQueue
from threading import Lock
from typing import Any, NoReturn

from gunicorn import util
from gunicorn.http import wsgi
from gunicorn.http.errors import ParseException
from gunicorn.workers.gthread import ThreadWorker

from todo_api import config, startup
from todo_api.server import gunicorn_check, stopping
from todo_api.server.client_socket import ClientSocket
from todo_api.server.reader import REQUEST_TIMEOUT, Reader
from todo_api.server.response import Response

_ACCEPT_PAUSE = 0.00005  # seconds; long enough for another worker to wake up
_NEXT_REQUEST_WAIT = 1  # milliseconds
_CLOSE_TIMEOUT = 2.0  # seconds for a client to close its side; gunicorn's own value
_READ_SIZE = 65_536  # bytes
_RESPAWN_PAUSE = 1  # second
_READ_TIMEOUT = 10.0  # seconds in which a client reads nothing of a response
_KEPT_RESPONSES = 256 * 1024 * 1024  # bytes that clients have not read yet
_KEPT_REQUESTS = 256 * 1024 * 1024  # bytes of unfinished requests
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
_SOCKET_TIMEOUT = struct.pack("@ll", 10, 0)  # a struct timeval: seconds and microseconds


def _should_log(record: logging.LogRecord) -> bool:
    """Return whether to log a record. The traceback of a socket that timed out is not logged: the client caused it."""
    return not (record.exc_info and isinstance(record.exc_info[1], BlockingIOError | TimeoutError))


def _sends_more(conn: Any) -> bool:
    """Return whether a part of the client's next request has arrived, or arrives within a millisecond."""
    if conn.parser.unreader.has_more():
        return True
    readable = select.poll()
    readable.register(conn.sock, select.POLLIN)
    return bool(readable.poll(_NEXT_REQUEST_WAIT))


class Worker(ThreadWorker):
    """A worker that accepts its share of the connections. Its threads take requests without gunicorn's main loop.

    A thread waits neither for the next request, nor for the rest of one, nor for a client that reads its response
    slowly. The poller of the main loop waits for all three.
    """

    alive: bool  # false once the worker accepts no connections any more

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create a worker without connections."""
        super().__init__(*args, **kwargs)
        self.ready_connections: SimpleQueue[Any] = SimpleQueue()  # connections with a request; None ends a thread
        self.unfinished: set[Any] = set()  # connections in the poller that have sent a part of a request
        self.sending: dict[Any, Any] = {}  # connections whose client reads slowly, with their results
        self.stop_at = inf  # when the worker stops accepting connections, by time.monotonic()
        self.is_quitting = False
        self.request_deadline = inf  # an upper limit for the deadlines of all requests, once the worker stops
        self.next_check = 0.0  # of the deadlines of requests
        # Held while a thread adds an idle connection, so that none is added after the stop has begun.
        self.keepalive_lock = Lock()
        self.closing_connections: deque[Any] = deque()  # connections whose client has to close its side

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """End the process if gunicorn is not the tested one; gunicorn's master calls this before it starts workers.

        Our settings use gunicorn's own worker then. Other settings may still name this worker.
        """
        if difference := gunicorn_check.difference():
            startup.fail(f"{difference}: set worker_class to gthread")
        is_plain = (
            cfg.http_protocols == ["h1"] and cfg.proxy_protocol == "off" and cfg.settings["protocol"].get() == "http"
        )
        if cfg.is_ssl or not is_plain:
            startup.fail("TLS, HTTP/2, uWSGI's protocol and the PROXY protocol need --worker-class gthread")
        super().check_config(cfg, log)

    def init_process(self) -> None:
        """Run the worker.

        Limit the time for which a client occupies a thread if it stops in the middle of a request or a response.
        """
        for listener in self.sockets:  # accepted connections inherit these options
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                listener.setsockopt(socket.SOL_SOCKET, option, _SOCKET_TIMEOUT)
        self.log.error_log.addFilter(_should_log)
        wsgi.Response = Response  # gunicorn has no setting for this
        # Each request looks up some 20 settings, with two calls each. Attributes need no calls: 8 % more reads.
        self.cfg.__dict__.update({name: setting.get() for name, setting in self.cfg.settings.items()})
        self.body_limit = config.load().max_body_bytes
        super().init_process()

    def init_signals(self) -> None:
        """Set the worker's handlers, and receive the signals that were sent to it since the fork."""
        super().init_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def handle_exit(self, _number: int, _frame: Any) -> None:
        """Stop on SIGTERM, after a time in which the worker still accepts connections.

        If the service stops, another SIGTERM comes from the master, and shortens this time.
        """
        if self.alive:
            self.stop_at = min(self.stop_at, time.monotonic() + stopping.accept_time(self.age))
            self.method_queue.defer(lambda: None)  # wakes up the main loop

    def handle_quit(self, number: int, frame: Any) -> None:
        """Stop at once, on SIGINT or SIGQUIT.

        Ctrl-C leads to both. The exception of a second one would interrupt the exit, and the worker would hang.
        """
        if not self.is_quitting:
            self.is_quitting = True
            super().handle_quit(number, frame)

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        """Wait for connections that need the main loop, until the worker stops accepting them."""
        if self.alive:
            timeout = min(timeout, max(self.stop_at - time.monotonic(), 0))
        super().wait_for_and_dispatch_events(timeout)
        if time.monotonic() >= self.stop_at:
            self.alive = False

    def run(self) -> None:
        """Handle requests until the worker stops."""
        try:
            for _ in range(self.cfg.threads):
                self.tpool.submit(self._work)
            super().run()
        except RuntimeError as error:  # the limit of processes or of memory is reached
            self._end_without_threads(error)
        finally:
            for _ in range(self.cfg.threads):
                self.ready_connections.put(None)

    def _end_without_threads(self, error: RuntimeError) -> NoReturn:
        """End the service if it has just started. Later, end this worker only, and let the master start another one."""
        reason = (
            f"a worker cannot start its {self.cfg.threads} threads ({error}): raise the limit of processes or memory"
        )
        if self.age <= self.cfg.workers:
            startup.fail(reason)
        self.log.error(reason)
        time.sleep(_RESPAWN_PAUSE)
        sys.exit(1)

    def _cap_keepalive(self, deadline: float) -> None:
        """Close the listening sockets, and keep idle connections until the deadline; gunicorn calls this at a stop.

        gunicorn would leave the listening sockets open until the last connection has closed, seconds later. No worker
        would accept the connection of a client that connects in this time.
        """
        self.alive = False  # still true at this point if the worker stops because its master has ended
        while self.sockets:
            self._accept_all(listener := self.sockets.pop())
            listener.close()
        with self.keepalive_lock:
            super()._cap_keepalive(deadline)
            self.request_deadline = deadline
        for conn in self.pending_conns:  # these clients have sent nothing yet
            conn.timeout = min(conn.timeout, deadline)

    def accept(self, listener: Any) -> None:
        """Accept a connection, and pause to leave the next one to another worker: each connection has many requests.

        Without the pause, one of two workers accepted all of 16 concurrent connections in 7 of 12 runs, and the service
        was half as fast. With the pause, each worker accepts 6 to 10 of them. SO_REUSEPORT is no alternative: it resets
        connections that a stopping worker has not accepted.
        """
        super().accept(listener)
        time.sleep(_ACCEPT_PAUSE)

    def _accept_all(self, listener: Any) -> None:
        """Accept the connections that wait. If the service stops, no other worker does, and no limit counts."""
        before = -1
        most = inf if stopping.has_begun() else self.worker_connections
        with suppress(OSError):  # the limit of open files is reached
            while before < self.nr_conns < most:
                before = self.nr_conns
                super().accept(listener)  # no pause, because another client could connect in it

    def enqueue_req(self, conn: Any) -> None:
        """Pass a connection to a thread once it has data. In gunicorn, a silent one occupies a thread for 5 s."""
        if conn.initialized or conn.data_ready:
            self.ready_connections.put(conn)
            return
        conn.sock = ClientSocket(conn.sock)
        # The keep-alive is the time between two requests, and may be 0. A client needs some time to send its first one.
        conn.timeout = time.monotonic() + max(self.cfg.keepalive, REQUEST_TIMEOUT)
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def _work(self) -> None:
        """Handle the requests of one ready connection after another.

        gunicorn passes each connection through a Future and its main loop. With 128 clients, this makes creates 13 %
        slower, and their p99 40 % longer.
        """
        while conn := self.ready_connections.get():
            try:
                if not self._is_request_there(conn):
                    if self._is_late(conn.parser.unreader.deadline):
                        self.method_queue.defer(self._time_out, conn)
                    else:
                        self._wait(conn)
                    continue
                result = self.handle(conn)
                if result is True and not conn.sock.unsent and self._keep(conn):
                    continue
            except ParseException as error:
                self.handle_error(None, conn.sock, conn.client, error)
                result = False
            except ConnectionError:
                result = False
            except BaseException:  # the thread must continue with other connections
                self.log.exception("Error handling request")
                result = False
            self.method_queue.defer(self._send_rest if conn.sock.unsent else self.finish_request, conn, result)

    def _is_request_there(self, conn: Any) -> bool:
        if not conn.initialized:
            conn.init()
            conn.parser.unreader = Reader(conn.sock, self.body_limit)
        reader: Reader = conn.parser.unreader
        return reader.receive()

    def _wait(self, conn: Any) -> None:
        """Let the poller wait for the rest of a request."""
        with self.keepalive_lock:
            conn.timeout = conn.parser.unreader.deadline
            self.unfinished.add(conn)
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._on_more, conn))

    def _on_more(self, conn: Any, sock: socket.socket) -> None:
        self.poller.unregister(sock)
        self.unfinished.remove(conn)
        self.ready_connections.put(conn)

    def _keep(self, conn: Any) -> bool:
        """Keep a connection for its next request, and return True, or return False if the worker stops.

        A thread may register the connection with the poller while the main loop waits in the poller. Only the main loop
        counts connections and removes them from the poller.
        """
        if conn.parser.unreader.has_more():  # the poller does not see what was read already
            self.ready_connections.put(conn)
            return True
        with self.keepalive_lock:
            if not self.alive:
                return False
            conn.set_timeout()
            self.keepalived_conns.append(conn)
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_client_socket_readable, conn))
            return True

    def handle(self, conn: Any) -> Any:
        """Handle a request, and the requests that follow it immediately while no other connection waits for a thread.

        With one client, passing the connection through the main loop took a quarter of the time of a read.
        """
        while (keep := super().handle(conn)) is True and self.alive and not conn.sock.unsent:
            if not self.ready_connections.empty() or not _sends_more(conn) or not self._is_request_there(conn):
                break
        return keep

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Handle a request, without gunicorn's "100 Continue": the reader sends it if the body is accepted."""
        req._expected_100_continue = False
        return super().handle_request(req, conn)

    def _send_rest(self, conn: Any, result: Any) -> None:
        """Let the poller send the rest of a response. If too much is unsent, give up the oldest responses."""
        conn.timeout = time.monotonic() + _READ_TIMEOUT
        self.sending[conn] = result
        self.poller.register(conn.sock, selectors.EVENT_WRITE, partial(self._on_writable, conn))
        while len(self.sending) > 1 and sum(other.sock.unsent for other in self.sending) > _KEPT_RESPONSES:
            self._give_up(next(iter(self.sending)))

    def _on_writable(self, conn: Any, sock: ClientSocket) -> None:
        try:
            if sock.send_more():
                conn.timeout = time.monotonic() + _READ_TIMEOUT
        except OSError:
            self._give_up(conn)
            return
        if not sock.unsent:
            self.poller.unregister(sock)
            self.finish_request(conn, self.sending.pop(conn))

    def _give_up(self, conn: Any) -> None:
        del self.sending[conn]
        self.poller.unregister(conn.sock)
        self._forget(conn)

    def finish_request(self, conn: Any, result: Any) -> None:
        """Keep or close a connection. gunicorn would block here until the client has closed its side too."""
        if result and conn.parser.unreader.has_more():
            self.ready_connections.put(conn)
            return
        if result:
            future: Future[Any] = Future()  # gunicorn expects a Future, which its thread pool would return
            future.set_result(result)
            super().finish_request(conn, future)
            return
        with suppress(OSError):
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.settimeout(0)
            conn.timeout = time.monotonic() + _CLOSE_TIMEOUT
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._discard, conn))
            self.closing_connections.append(conn)
            return
        self._forget(conn)

    def _discard(self, conn: Any, sock: socket.socket) -> None:
        """Discard data of the client. A close with unread data would reset the connection and lose the response."""
        with suppress(OSError):
            if sock.recv(_READ_SIZE):
                return
        self.closing_connections.remove(conn)
        self.poller.unregister(sock)
        self._forget(conn)

    def _forget(self, conn: Any) -> None:
        self.nr_conns -= 1
        conn.close()

    def murder_pending(self) -> None:
        """Close the connections whose timeout has passed."""
        super().murder_pending()
        self._end_unfinished()
        for conn in [conn for conn in self.sending if conn.timeout < time.monotonic()]:
            self._give_up(conn)
        while self.closing_connections and self.closing_connections[0].timeout < time.monotonic():
            conn = self.closing_connections.popleft()
            self.poller.unregister(conn.sock)
            self._forget(conn)

    def _end_unfinished(self) -> None:
        """Once a second, respond with a 408 to the requests that are unfinished at their deadline.

        If the others are too large together, those that began first get a 408, too.

        A client that keeps sending is rarely among them: its connection is mostly with a thread, which checks the
        deadline too.
        """
        if (now := time.monotonic()) < self.next_check:
            return
        self.next_check = now + 1
        with self.keepalive_lock:
            oldest_first = sorted(self.unfinished, key=attrgetter("timeout"))
        excess = sum(len(conn.parser.unreader.data) for conn in oldest_first) - _KEPT_REQUESTS
        for conn in oldest_first:
            if excess > 0 or self._is_late(conn.timeout):
                excess -= len(conn.parser.unreader.data)
                self.poller.unregister(conn.sock)
                self.unfinished.remove(conn)
                conn.parser.unreader.data.clear()
                self._time_out(conn)

    def _is_late(self, deadline: float) -> bool:
        return min(deadline, self.request_deadline) < time.monotonic()

    def _time_out(self, conn: Any) -> None:
        with suppress(OSError):
            util.write_error(conn.sock, HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.REQUEST_TIMEOUT.phrase, "")
        self.finish_request(conn, result=False)
