"""A GPU's streams on a CPU: what is asked of one is done in order, by a thread, while the host goes on."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Device:
    """A rank's GPU.

    Args:
        one_queue: whether its streams share one hardware queue.
    """

    def __init__(self, one_queue: bool = False) -> None:
        self._shared = _Queue() if one_queue else None
        self.default_stream = self.stream()
        self._current = threading.local()

    def stream(self) -> "Stream":
        return Stream(self._shared or _Queue(), in_turn=self._shared is None)

    @property
    def current_stream(self) -> "Stream":
        """Of this thread."""
        return getattr(self._current, "stream", self.default_stream)

    @contextmanager
    def using(self, stream: "Stream") -> Iterator[None]:
        self._current.stream = stream
        try:
            yield
        finally:
            del self._current.stream


class _Queue:
    """Does one thing after another, in a thread."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.put = self._queue.put
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._queue.get()()


class Stream:
    """A CUDA stream.

    Args:
        hardware: the queue that what it is asked for goes through.
        in_turn: whether the queue does one kernel after another, as that of a stream of its own; otherwise it only
            starts them.
    """

    def __init__(self, hardware: _Queue, in_turn: bool) -> None:
        self._hardware, self._in_turn = hardware, in_turn
        self._last = threading.Event()
        self._last.set()

    def kernel(self, run: Callable[[], object]) -> None:
        """Asks for a kernel."""
        if self._in_turn:
            self._hardware.put(run)
            return

        def start() -> None:
            self._last.wait()
            self._last = done = threading.Event()

            def run_beside() -> None:
                run()
                done.set()

            threading.Thread(target=run_beside, daemon=True).start()

        self._hardware.put(start)

    def record(self) -> threading.Event:
        """An event that comes when all that was asked for so far is done."""
        event = threading.Event()
        self.kernel(event.set)
        return event

    def wait(self, event: threading.Event) -> None:
        """Lets what is asked for later start only after the event; with one queue, that of other streams too."""
        self._hardware.put(event.wait)

    wait_event = wait

    def synchronize(self, seconds: float | None = None) -> bool:
        """Waits on the host until the stream has done all that was asked for; whether it has, within a time."""
        return self.record().wait(seconds)
