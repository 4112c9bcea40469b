"""Engines in processes of their own as one text generator: one on a CPU, or one a group of cards.

All take requests from one stream: whichever has room gets the next. An engine that dies loses
nothing, as its requests in flight go to the others, or to its successor: where memory ran out, or
the system killed it, maybe for that, it is started again in a new process for half as many requests
at once. A process that met the end of memory keeps what it had.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import Any, Final, Protocol

from recbole_gacllm.errors import GaCLLMError, GenerationError, MemoryRanOutError
from recbole_gacllm.llm.generator import Completion, Request, TextGenerator

logger = logging.getLogger(__name__)

# To an engine: drop what is in flight and answer the same; close and end.
_STOP: Final = "stop"
_END: Final = "end"
_SECONDS_TO_END: Final = 30.0
_MAX_RESTARTS: Final = 3
_LIKELY_WINDOW: Final = 512  # vLLM's choice on most GPUs, known for sure once an engine has started


class Engine(TextGenerator, Protocol):
    """A text generator that says how many requests in flight keep it busy."""

    window: int


# Loads an engine for so many requests in flight at most; None is its own choice.
Load = Callable[[int | None], Engine]


class Fleet:
    """Engines in processes of their own, which end with this one.

    Args:
        engines: For each, variables of its environment, and what loads it there; picklable.
        window: Requests in flight at each engine at most.

    Raises:
        GenerationError: If none starts.
        ValueError: If one refuses what it is given, such as an adapter that does not fit.
    """

    def __init__(
        self, engines: Sequence[tuple[Mapping[str, str], Load]], window: int | None = None
    ) -> None:
        self._members = [_Member(n, *engine, window) for n, engine in enumerate(engines)]
        atexit.register(self.close)  # before multiprocessing waits for them
        try:
            for member in self._members:
                while not (member.window or member.error):
                    member.receive()
            self._living()
        except BaseException:
            self.close()
            raise

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Complete requests; see :class:`~recbole_gacllm.llm.generator.TextGenerator`."""
        source, moved = iter(requests), deque[Request]()
        try:
            while not self._hand_out(moved, source) or any(m.in_flight for m in self._members):
                waiting = [m for m in self._members if m.in_flight or not (m.window or m.error)]
                # The time limit is for a death that a connection does not tell: what the engine
                # has forked may hold the other end.
                connection.wait([member.connection for member in waiting], timeout=1.0)
                for member in waiting:
                    if not member.has_news():
                        continue
                    completion = member.receive()
                    if completion is None:
                        moved.extend(member.in_flight.values())
                        member.in_flight.clear()
                    else:
                        del member.in_flight[completion.id]
                        yield completion
        finally:
            self._drop()

    def close(self) -> None:
        """End the engines and their processes."""
        atexit.unregister(self.close)
        for member in self._members:
            member.send(_END)
        for member in self._members:
            member.end()
            member.in_flight.clear()
            member.error = member.error or "closed"

    def _hand_out(self, moved: deque[Request], source: Iterator[Request]) -> bool:
        """Give requests, those of dead engines first, to the least busy until all are busy.

        Returns:
            Whether there was none left to give.
        """
        while members := [m for m in self._living() if len(m.in_flight) < m.window]:
            request = moved.popleft() if moved else next(source, None)
            if request is None:
                return True
            member = min(members, key=lambda m: len(m.in_flight))
            member.in_flight[request.id] = request
            member.send(request)
        return False

    def _living(self) -> list[_Member]:
        living = [member for member in self._members if not member.error]
        if not living:
            errors = "; ".join(f"{member.name}: {member.error}" for member in self._members)
            message = f"all engines have stopped ({errors})."
            if any(member.has_worked for member in self._members):
                message += " Completions handed out before are good; start again to go on there."
            raise GenerationError(message)
        return living

    def _drop(self) -> None:
        """Stop the work that an abandoned call left."""
        abandoned = [member for member in self._members if member.in_flight and not member.error]
        for member in abandoned:
            member.send(_STOP)
        for member in abandoned:
            while member.in_flight:
                with suppress(ValueError):  # of another request
                    if member.receive() in (_STOP, None):
                        member.in_flight.clear()


class _Member:
    """This process's side of an engine, and of its successors."""

    def __init__(
        self, number: int, environment: Mapping[str, str], load: Load, window: int | None
    ) -> None:
        variables = ", ".join(f"{name}={value}" for name, value in environment.items())
        self.name = f"engine {number}" + (f" ({variables})" if variables else "")
        self.in_flight: dict[str, Request] = {}  # by id
        self.error = ""  # why it is dead for good
        self.has_worked = False
        self._environment, self._load = dict(environment), load
        self._n_restarts = 0
        self._start(window)

    def _start(self, window: int | None) -> None:
        self.window, self._window_asked = 0, window  # how many it takes at once, once it has loaded
        spawning = get_context("spawn")
        self.connection, of_engine = spawning.Pipe()
        # Not a daemon: those may not start processes, and vLLM does on GPUs.
        self._process = spawning.Process(
            target=_serve, args=(of_engine, self._environment, self._load, window), name=self.name
        )
        self._process.start()
        of_engine.close()

    def has_news(self) -> bool:
        """Whether it said something, or died."""
        return self.connection.poll() or not self._process.is_alive()

    def send(self, message: Request | str) -> None:
        """A dead engine takes no message; :meth:`receive` tells that it is dead."""
        with suppress(OSError):
            self.connection.send(message)

    def receive(self) -> Any:
        """Wait for what the engine says next; None if it has started, or died.

        Raises:
            ValueError: If it refuses a request, or what it was to be loaded with.
        """
        try:
            while not self.connection.poll(1.0):
                if not self._process.is_alive():
                    raise EOFError
            message = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(5.0)
            code = self._process.exitcode
            kind = MemoryRanOutError if code == -signal.SIGKILL else GenerationError
            message = kind(f"its process ended with exit code {code}")
        match message:
            case ValueError():
                raise message
            case GaCLLMError():
                self._mourn(message)
                return None
            case int():
                self.window, self.has_worked = message, True
                return None
        return message

    def _mourn(self, error: GaCLLMError) -> None:
        """Start a successor, if a smaller one may do."""
        logger.warning("%s has stopped: %s", self.name, error)
        if not isinstance(error, MemoryRanOutError) or self._n_restarts == _MAX_RESTARTS:
            self.error = str(error)
            return
        self._n_restarts += 1
        window = max(1, (self.window or self._window_asked or _LIKELY_WINDOW) // 2)
        self.end()  # and with it its memory
        logger.warning("%s starts again with at most %d requests at once", self.name, window)
        self._start(window)

    def end(self) -> None:
        """Wait for its process, and kill it if it takes too long."""
        self._process.join(_SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.connection.close()


def _serve(
    to_parent: Connection, environment: dict[str, str], load: Load, window: int | None
) -> None:
    """The engine's process: complete what comes, until the end or the parent's death."""
    os.environ.update(environment)
    inbox = _Inbox(to_parent)
    engine = None
    try:
        engine = load(window)
        to_parent.send(engine.window)
        while (order := inbox.wait()) != _END:
            if order == _STOP:
                to_parent.send(_STOP)
                continue
            try:
                for completion in engine.generate(inbox):
                    to_parent.send(completion)
                    if inbox.stopped:
                        break
            except ValueError as error:
                to_parent.send(ValueError(str(error)))
    except ValueError as error:  # of load
        to_parent.send(ValueError(str(error)))
    except GaCLLMError as error:
        to_parent.send(error)
    except (BrokenPipeError, KeyboardInterrupt):
        logger.debug("the parent is gone, or was interrupted")
    finally:
        if engine is not None:
            engine.close()


class _Inbox(Iterator[Request]):
    """What comes from the parent, read by a thread, so that the parent never waits to write.

    As an iterator it ends where no request is there *now* and goes on when one has come: vLLM's
    engine asks again at every step.

    Attributes:
        stopped: An order has come: requests from before are dropped.
    """

    def __init__(self, from_parent: Connection) -> None:
        self.stopped = False
        self._connection = from_parent
        self._messages: deque[Request | str] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def wait(self) -> str:
        """Wait for something to do: an order, or ``work`` where requests are there."""
        with self._changed:
            self._changed.wait_for(lambda: self._messages)
            while self.stopped:
                message = self._messages.popleft()
                if isinstance(message, str):
                    self.stopped = bool(self._messages)
                    return message
            return "work"

    def __next__(self) -> Request:
        with self._changed:
            if self.stopped or not self._messages:
                raise StopIteration
            request = self._messages.popleft()
            assert isinstance(request, Request)
            return request

    def _read(self) -> None:
        message: Request | str = ""
        while message != _END:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                message = _END
            with self._changed:
                self._messages.append(message)
                self.stopped = self.stopped or isinstance(message, str)
                self._changed.notify()
