"""A few threads that send responses, so that one slow round trip holds up no other request.

A stream that has something to send is woken; a free thread serves it. A stream woken again before its turn
keeps its place and sends everything at once, so a pool that is behind sends fewer and larger responses
instead of falling further behind. One thread at a time serves a stream, so its responses keep their order.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

Stream = TypeVar("Stream", bound=Hashable)


class SenderPool(Generic[Stream]):
    """Threads that call `serve` with each stream that was woken.

    Args:
        serve: sends what the stream has; must not raise.
        num_threads: streams served at the same time.
    """

    def __init__(self, serve: Callable[[Stream], None], num_threads: int) -> None:
        self._serve = serve
        self._changed = threading.Condition()
        self._waiting: OrderedDict[Stream, None] = OrderedDict()
        self._being_served: set[Stream] = set()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"sender-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def wake(self, streams: Iterable[Stream]) -> None:
        """Have each of `streams` served once more from now on; costs the caller no more than a lock."""
        with self._changed:
            for stream in streams:
                self._waiting[stream] = None
            self._changed.notify(len(self._threads))

    def close(self, timeout_s: float) -> None:
        """Serve what is waiting, then end the threads, waiting at most `timeout_s` seconds for each."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self) -> None:
        while (stream := self._next()) is not None:
            self._serve(stream)
            with self._changed:
                self._being_served.discard(stream)

    def _next(self) -> Stream | None:
        """The stream that has waited longest and is not being served; None once closed.

        A stream that is being served is left to the thread that serves it, which comes back here.
        """
        with self._changed:
            while True:
                for stream in self._waiting:
                    if stream not in self._being_served:
                        del self._waiting[stream]
                        self._being_served.add(stream)
                        return stream
                if self._closed:
                    return None
                self._changed.wait()
