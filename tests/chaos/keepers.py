"""Processes that hold a namespace for others, and do in it what they are asked to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from tests.processes import FORKS, Forked

STARTS = threading.Lock()
"""Held while a process is started or asked whether it has ended: `multiprocessing` keeps one list for all threads."""


class Guarded(Forked):
    """A process that a thread starts and watches while others do the same.

    Args:
        function: what it runs; must be a function of a module.
        *arguments: the function's arguments.
    """

    def __init__(self, function: Callable[..., None], *arguments: object) -> None:
        with STARTS:
            self._process = FORKS.Process(target=function, args=arguments, daemon=True)
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        with STARTS:
            return self._process.exitcode


class Keeper:
    """A process that answers requests until it is closed.

    Args:
        function: a generator function of a module. It yields its first answer when it is ready, and then an answer to
            each request, which it is sent. An OSError that it raises is raised here.
        *arguments: the function's arguments.
    """

    def __init__(self, function: Callable[..., Iterator[Any]], *arguments: object) -> None:
        self._lock = threading.Lock()
        self._pipe, theirs = FORKS.Pipe()
        self._process = Guarded(_answer, theirs, function, arguments)
        theirs.close()
        self.pid = self._process.pid
        self.first = self._take()

    def ask(self, request: object) -> Any:
        with self._lock:
            self._pipe.send(request)
            return self._take()

    def close(self) -> None:
        """End the process, and with it what it holds."""
        self._pipe.close()
        with STARTS:
            self._process.kill()

    def _take(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, OSError):
            raise answer
        return answer


def _answer(pipe: Connection, function: Callable[..., Iterator[Any]], arguments: tuple[object, ...]) -> None:
    try:
        answering = function(pipe, *arguments)
        pipe.send(next(answering))
        for answer in answering:
            pipe.send(answer)
    except OSError as error:
        pipe.send(error)
