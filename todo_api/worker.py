"""gunicorn's threaded worker with shorter ways: to a client's next request, to other workers, and to the end."""

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

from todo_api.response import Response

_TURN = 0.00005  # seconds for another worker to wake up
_SIGNS = 0.5  # seconds between signs of life
_MOMENT = 1  # millisecond for a client to send its next request; two were no faster
_LINGER = 2.0  # seconds for a client to close its side, as gunicorn has it
_PIECE = 65_536
_SILENCE = struct.pack("@ll", 10, 0)  # seconds and microseconds; a struct timeval


def _is_no_halt(record: logging.LogRecord) -> bool:
    """Say whether a line is something else than the traceback of a client that halted, which is nobody's bug."""
    return not (record.exc_info and isinstance(record.exc_info[1], BlockingIOError))


def _is_followed(conn: Any) -> bool:
    """Wait a moment for the client's next request; it may have come along with the one before."""
    if conn.parser.unreader.buf.getvalue():
        return True
    readable = select.poll()
    readable.register(conn.sock, select.POLLIN)
    return bool(readable.poll(_MOMENT))


class Worker(ThreadWorker):
    """A worker that takes its share of the clients, and whose threads go from one request to the next themselves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Begin without connections."""
        super().__init__(*args, **kwargs)
        self.next_sign = 0.0  # when to give one
        self.ready: SimpleQueue[Any] = SimpleQueue()  # connections with a request; None sends a thread home
        self.keeping = Lock()  # held while a connection is kept, which no thread does any more once the worker stops
        self.leaving: deque[Any] = deque()  # connections that wait for their client to close its side

    def init_process(self) -> None:
        """Run, and see to it that a client that halts within a request or an answer does not keep a thread for ever."""
        for listener in self.sockets:  # the connections that it accepts have these from it
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                listener.setsockopt(socket.SOL_SOCKET, option, _SILENCE)
        self.log.error_log.addFilter(_is_no_halt)
        wsgi.Response = Response  # there is no setting for it
        # A request reads some 20 settings, each in two calls; as attributes they cost none (16 us of gunicorn's 76).
        # Whoever sets one from here on would not see it; nobody does.
        self.cfg.__dict__.update({name: setting.get() for name, setting in self.cfg.settings.items()})
        super().init_process()

    def run(self) -> None:
        """Answer requests until told to stop."""
        for _ in range(self.cfg.threads):
            self.tpool.submit(self._work)
        try:
            super().run()
        finally:
            for _ in range(self.cfg.threads):
                self.ready.put(None)

    def notify(self) -> None:
        """Give the master a sign of life, now and then: gunicorn gives one for each event, and waits 30 s for one.

        Their system call alone took 0.6 % of a worker's time.
        """
        if time.monotonic() > self.next_sign:
            self.next_sign = time.monotonic() + _SIGNS
            super().notify()

    def _cap_keepalive(self, deadline: float) -> None:
        """Begin to stop, which gunicorn does with this: connections without a request are kept until then.

        It leaves the listening sockets open until the last connection has gone, seconds later. Who connects meanwhile
        would send a request to nobody, and be reset in the end: so they are closed now, for the next to be refused.
        """
        self.alive = False  # where the master is gone, it still is
        while self.sockets:
            self._accept_all(listener := self.sockets.pop())
            listener.close()
        with self.keeping:
            super()._cap_keepalive(deadline)
        for conn in self.pending_conns:  # they never asked for anything
            conn.timeout = min(conn.timeout, deadline)

    def accept(self, listener: Any) -> None:
        """Take a connection, and then let the other workers have the next: it may be kept for many requests.

        Of 16 that came at once, one worker took all in 7 of 12 tries, and the service was half as fast; now 6 to 10.
        SO_REUSEPORT shares out, too, but resets those that have not been taken when a worker stops.
        """
        super().accept(listener)
        time.sleep(_TURN)

    def _accept_all(self, listener: Any) -> None:
        before = -1
        while before < self.nr_conns < self.worker_connections:
            before = self.nr_conns
            super().accept(listener)  # without a pause, in which somebody could connect to nobody

    def enqueue_req(self, conn: Any) -> None:
        """Give a connection with a request to a thread; a new one that is silent would have kept it for 5 s."""
        if conn.initialized or conn.data_ready:
            self.ready.put(conn)
            return
        conn.set_timeout()
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def _work(self) -> None:
        """Answer one connection's request after the other's.

        gunicorn makes a Future of each, and has the main loop keep the connection: with 128 clients creates were 13 %
        slower by that, and their p99 was 40 % longer.
        """
        while conn := self.ready.get():
            try:
                result = self.handle(conn)
                if result is True and self._keep(conn):
                    continue
            except BaseException:  # the thread has other connections to serve
                self.log.exception("Error handling request")
                result = False
            self.method_queue.defer(self.finish_request, conn, result)

    def _keep(self, conn: Any) -> bool:
        """Keep a connection for its next request, unless the worker stops.

        The main loop may be waiting in the poller meanwhile, which takes new ones all the same. It alone counts
        connections, and takes them out again.
        """
        if conn.parser.unreader.buf.getvalue():  # it came along with the one before: the poller does not see it
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
        """Answer a request, and those that follow it at once, as long as no other connection waits for a thread.

        Where one client asked, the way through the main loop to another thread took a quarter of a read.
        """
        while (keep := super().handle(conn)) is True and self.alive and self.ready.empty() and _is_followed(conn):
            pass
        return keep

    def finish_request(self, conn: Any, result: Any) -> None:
        """Keep a connection for a request, or let it go; gunicorn would wait here until the client has, too."""
        if result:
            future: Future[Any] = Future()  # as gunicorn has it from its pool
            future.set_result(result)
            super().finish_request(conn, future)
            return
        with suppress(OSError):
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.settimeout(0)
            conn.timeout = time.monotonic() + _LINGER
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._discard, conn))
            self.leaving.append(conn)
            return
        self._forget(conn)

    def _discard(self, conn: Any, sock: socket.socket) -> None:
        """Throw away what a client still sends: to close before it has been read would cut the answer off."""
        with suppress(OSError):
            if sock.recv(_PIECE):
                return
        self.leaving.remove(conn)
        self.poller.unregister(sock)
        self._forget(conn)

    def _forget(self, conn: Any) -> None:
        self.nr_conns -= 1
        conn.close()

    def murder_pending(self) -> None:
        """Close the connections whose clients have had time enough."""
        super().murder_pending()
        while self.leaving and self.leaving[0].timeout < time.monotonic():
            conn = self.leaving.popleft()
            self.poller.unregister(conn.sock)
            self._forget(conn)
