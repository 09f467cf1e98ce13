"""gunicorn's threaded worker, changed so that silent clients hold no thread, and no request is lost at a stop."""

import logging
import select
import selectors
import socket
import struct
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Lock
from typing import Any

from gunicorn.http import wsgi
from gunicorn.workers.gthread import ThreadWorker

from todo_api.server.response import Response

_ACCEPT_PAUSE = 0.00005  # seconds, in which another worker wakes up
_NEXT_REQUEST_WAIT = 1  # milliseconds
_CLOSE_TIMEOUT = 2.0  # seconds for a client to close its side, as in gunicorn
_READ_SIZE = 65_536  # bytes
_SOCKET_TIMEOUT = struct.pack("@ll", 10, 0)  # a struct timeval: seconds and microseconds


def _is_no_timeout(record: logging.LogRecord) -> bool:
    """Return False for the traceback of a socket that timed out: the client stopped, which is no error of ours."""
    return not (record.exc_info and isinstance(record.exc_info[1], BlockingIOError))


def _has_next_request(conn: Any) -> bool:
    """Return whether the client's next request is there, or arrives in a moment."""
    if conn.parser.unreader.buf.getvalue():
        return True
    readable = select.poll()
    readable.register(conn.sock, select.POLLIN)
    return bool(readable.poll(_NEXT_REQUEST_WAIT))


class Worker(ThreadWorker):
    """A worker that accepts its share of the clients, and whose threads take the next request themselves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Create it without connections."""
        super().__init__(*args, **kwargs)
        self.ready: SimpleQueue[Any] = SimpleQueue()  # connections with a request; None ends a thread
        self.keeping = Lock()  # held while a connection is kept alive; none is after the worker began to stop
        self.closing: deque[Any] = deque()  # connections that wait for their client to close its side

    def init_process(self) -> None:
        """Run. A client that stops within a request or an answer holds its thread for a limited time."""
        for listener in self.sockets:  # accepted connections inherit these
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                listener.setsockopt(socket.SOL_SOCKET, option, _SOCKET_TIMEOUT)
        self.log.error_log.addFilter(_is_no_timeout)
        wsgi.Response = Response  # there is no setting for it
        # A request reads some 20 settings, each in two calls. As attributes they take no time: 8 % more reads.
        self.cfg.__dict__.update({name: setting.get() for name, setting in self.cfg.settings.items()})
        super().init_process()

    def run(self) -> None:
        """Answer requests until the worker is stopped."""
        for _ in range(self.cfg.threads):
            self.tpool.submit(self._work)
        try:
            super().run()
        finally:
            for _ in range(self.cfg.threads):
                self.ready.put(None)

    def _cap_keepalive(self, deadline: float) -> None:
        """Begin to stop; gunicorn calls this at that moment. Idle connections are kept until the deadline.

        gunicorn would leave the listening sockets open until the last connection has closed, seconds later. A client
        that connects meanwhile would send its request to nobody. So the sockets are closed now.
        """
        self.alive = False  # it is still true if the worker stops because its master has gone
        while self.sockets:
            self._accept_all(listener := self.sockets.pop())
            listener.close()
        with self.keeping:
            super()._cap_keepalive(deadline)
        for conn in self.pending_conns:  # these have sent no request yet
            conn.timeout = min(conn.timeout, deadline)

    def accept(self, listener: Any) -> None:
        """Accept a connection, and leave the next one to another worker, because a connection has many requests.

        Without the pause, one worker accepted all of 16 concurrent connections in 7 of 12 tries, and the service was
        half as fast; with it, each accepts 6 to 10. SO_REUSEPORT would reset connections that a stopping worker has not
        accepted.
        """
        super().accept(listener)
        time.sleep(_ACCEPT_PAUSE)

    def _accept_all(self, listener: Any) -> None:
        before = -1
        while before < self.nr_conns < self.worker_connections:
            before = self.nr_conns
            super().accept(listener)  # without the pause, in which another client could connect

    def enqueue_req(self, conn: Any) -> None:
        """Hand a connection to a thread once it has sent something; in gunicorn a silent one holds a thread for 5 s."""
        if conn.initialized or conn.data_ready:
            self.ready.put(conn)
            return
        conn.set_timeout()
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def _work(self) -> None:
        """Answer one request after another, each from the next connection that has one.

        gunicorn passes each connection through a Future and its main loop. With 128 clients that makes creates 13 %
        slower, and their p99 40 % longer.
        """
        while conn := self.ready.get():
            try:
                result = self.handle(conn)
                if result is True and self._keep(conn):
                    continue
            except BaseException:  # the thread must go on with other connections
                self.log.exception("Error handling request")
                result = False
            self.method_queue.defer(self.finish_request, conn, result)

    def _keep(self, conn: Any) -> bool:
        """Keep a connection alive for its next request, unless the worker stops.

        The poller accepts it even while the main loop waits in it. Only the main loop counts connections and removes
        them from the poller.
        """
        if conn.parser.unreader.buf.getvalue():  # the next request has been read already: the poller cannot see it
            self.ready.put(conn)
            return True
        with self.keeping:
            if not self.alive:
                return False
            conn.set_timeout()
            self.keepalived_conns.append(conn)
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_client_socket_readable, conn))
            return True

    def handle(self, conn: Any) -> Any:
        """Answer a request and those that follow it at once, as long as no other connection waits for a thread.

        With one client, the way through the main loop to another thread took a quarter of the time of a read.
        """
        while (keep := super().handle(conn)) is True and self.alive and self.ready.empty() and _has_next_request(conn):
            pass
        return keep

    def finish_request(self, conn: Any, result: Any) -> None:
        """Keep a connection or close it. gunicorn would wait here until the client has closed its side too."""
        if result:
            future: Future[Any] = Future()  # gunicorn expects the one of its thread pool
            future.set_result(result)
            super().finish_request(conn, future)
            return
        with suppress(OSError):
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.settimeout(0)
            conn.timeout = time.monotonic() + _CLOSE_TIMEOUT
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._discard, conn))
            self.closing.append(conn)
            return
        self._forget(conn)

    def _discard(self, conn: Any, sock: socket.socket) -> None:
        """Read what a client still sends. A close with unread data would reset the connection and lose the answer."""
        with suppress(OSError):
            if sock.recv(_READ_SIZE):
                return
        self.closing.remove(conn)
        self.poller.unregister(sock)
        self._forget(conn)

    def _forget(self, conn: Any) -> None:
        self.nr_conns -= 1
        conn.close()

    def murder_pending(self) -> None:
        """Close the connections whose time is up."""
        super().murder_pending()
        while self.closing and self.closing[0].timeout < time.monotonic():
            conn = self.closing.popleft()
            self.poller.unregister(conn.sock)
            self._forget(conn)
