"""The socket through which `fedlora-server status` and `stop` reach a running server: server.sock in the run's folder.

A connection carries one request, a line of JSON, and one answer, another. Only the server's own user can connect, since
the socket's file has mode 0600. A client that is slow, sends too much or never reads costs the server one of a few
threads for `PATIENCE_S` seconds, and nothing else.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

log = logging.getLogger(__name__)

FILE = "server.sock"
MOST_BYTES = 4096
"""Largest request, in bytes."""
MOST_AT_ONCE = 8
"""Largest number of connections at a time. Further ones are closed at once."""
PATIENCE_S = 2.0
"""Seconds that a connection may take from its beginning to the end of its answer."""
LONGEST_PATH = 100
"""Longest path, in bytes, that every system takes for a socket's name. Linux allows 107, macOS 103."""
LOOK_EVERY_S = 0.5

Answer = Callable[[Mapping[str, Any]], tuple[Mapping[str, object], bool]]
"""A function that takes a request and returns the answer, and whether the connection stays open until the server ends,
so that the client notices the end. It raises ValueError if the request is wrong."""


@contextmanager
def reachable(path: Path) -> Iterator[str]:
    """Yield a name under which a socket at this path can be bound or reached, however long the path is.

    Raises:
        OSError: the path is too long for a socket, and this system has no /proc through which it could be shortened.
    """
    if len(os.fsencode(path)) <= LONGEST_PATH:
        yield str(path)
        return
    if not Path("/proc/self/fd").is_dir():
        raise OSError(errno.ENAMETOOLONG, f"its path is longer than the {LONGEST_PATH} bytes that a socket's can have")
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class ControlSocket:
    """The server's end. It answers from `open` until `close`, in threads of its own.

    Args:
        folder: the run's folder, which this process has locked. A socket that a killed server left there is replaced.
        answer: answers requests, in any thread; it must return quickly.
    """

    def __init__(self, folder: Path, answer: Answer) -> None:
        self._path, self._answer = folder / FILE, answer
        self._listener: socket.socket | None = None
        self._file: tuple[int, int] | None = None
        self._held: list[socket.socket] = []
        self._places = threading.BoundedSemaphore(MOST_AT_ONCE)
        self._closed = threading.Event()

    def open(self) -> Self:
        """Begin to listen. If that is impossible, log why: the run goes on without."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            if self._path.is_socket():
                self._path.unlink()
            with reachable(self._path) as name:
                listener.bind(name)
            self._path.chmod(0o600)  # nobody can connect before `listen`
            listener.listen(MOST_AT_ONCE)
            about = self._path.stat()
        except OSError as error:
            listener.close()
            log.warning("fedlora-server status and stop will not reach this server: %s cannot be made: %s", self._path,
                        error.strerror or error)
            return self
        listener.settimeout(LOOK_EVERY_S)
        self._listener, self._file = listener, (about.st_dev, about.st_ino)
        threading.Thread(target=self._accept, args=(listener,), name="fedlora-control", daemon=True).start()
        return self

    def close(self) -> None:
        """Stop listening, remove the socket's file, and let go of the clients that wait for the end."""
        self._closed.set()
        if self._listener is not None:
            self._listener.close()
            with suppress(OSError):
                about = self._path.lstat()
                if stat.S_ISSOCK(about.st_mode) and (about.st_dev, about.st_ino) == self._file:
                    self._path.unlink()
        held, self._held = self._held, []
        for connection in held:
            connection.close()

    def _accept(self, listener: socket.socket) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:  # closed, or no descriptor is left for now
                self._closed.wait(LOOK_EVERY_S)
                continue
            if self._places.acquire(blocking=False):
                threading.Thread(target=self._serve, args=(connection,), name="fedlora-control", daemon=True).start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        stays = False
        try:
            deadline = time.monotonic() + PATIENCE_S
            answer, stays = self._answered(connection, deadline)
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            connection.sendall(json.dumps(answer).encode() + b"\n")
            if stays := stays and len(self._held) < MOST_AT_ONCE:
                self._held.append(connection)
                stays = not self._closed.is_set()
        except OSError:
            stays = False  # the client is gone, or too slow
        except Exception:
            stays = False
            log.exception("A request at %s could not be answered", self._path)
        finally:
            if not stays:
                connection.close()
            self._places.release()

    def _answered(self, connection: socket.socket, deadline: float) -> tuple[Mapping[str, object], bool]:
        try:
            request = json.loads(_read_line(connection, deadline, MOST_BYTES))
            if not isinstance(request, dict):
                raise ValueError("a request is one JSON object")
            return self._answer(request)
        except (ValueError, RecursionError) as error:
            return {"error": str(error)}, False


def ask(folder: Path, request: Mapping[str, object], timeout_s: float = 10.0
        ) -> tuple[dict[str, Any], socket.socket]:
    """Send a request to the server of a run's folder.

    Returns:
        The answer, and the connection, which the caller closes.

    Raises:
        OSError: no server listens there, this user may not connect, or no answer came in time.
        ValueError: the server says that the request is wrong, or its answer is no JSON object.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        deadline = time.monotonic() + timeout_s
        with reachable(folder / FILE) as name:
            while True:
                try:
                    connection.connect(name)
                    break
                except BlockingIOError:  # many are connecting
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(0.05)
        connection.sendall(json.dumps(request).encode() + b"\n")
        answer = json.loads(_read_line(connection, deadline, 64 << 20))
        if not isinstance(answer, dict):
            raise ValueError("its answer is no JSON object")
        if "error" in answer:
            raise ValueError(str(answer["error"]))
        return answer, connection
    except BaseException:
        connection.close()
        raise


def _read_line(connection: socket.socket, deadline: float, most: int) -> bytes:
    """Return what comes up to a line end.

    Raises:
        OSError: it does not come before the deadline (monotonic seconds), or the other side ended without it.
        ValueError: it is longer than `most` bytes.
    """
    data = bytearray()
    while not data.endswith(b"\n"):
        if len(data) > most:
            raise ValueError(f"the line is longer than {most} bytes")
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError("no whole line came in time")
        connection.settimeout(left)
        if not (part := connection.recv(65536)):
            raise ConnectionError("the other side ended the connection")
        data += part
    return bytes(data)
