"""Finds out which clients have gone: asks request by request, spread evenly over time.

Triton tells a Python model of a closed stream only when asked, and asking is a round trip to the server's
process. So each request is asked about once in `POLL_INTERVAL_S`, a few at a time, off the tokens' path.

The final response of a cancelled request comes `END_DELAY_S` later. Up to version 2.71 at least, Triton's
gRPC frontend gives back a cancelled stream's state once the final response has come, even where the end of
the write before it still waits in its completion queue, behind those of other streams; what comes second then
finds freed memory, and the server crashes.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

POLL_INTERVAL_S = 0.15
"""From one question about a request to the next."""
TICK_S = 0.02
"""From one group of questions to the next."""
MAX_QUESTIONS_PER_TICK = 26
"""Keeps the cost within 3% of a core when thousands of requests wait; each is then asked about less often."""
END_DELAY_S = 1.0
"""From noticing that a client has gone to the final response, which nobody reads."""

logger = logging.getLogger(__name__)


class Cancellable(Protocol):
    """A request that its client may have given up."""

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to cancel."""

    def is_cancelled(self) -> bool:
        """Ask whether the client has gone; a round trip."""


Watched = TypeVar("Watched", bound=Cancellable)


class CancellationPoller(Generic[Watched]):
    """A thread that finds requests whose clients have gone.

    Args:
        cancel: called at once, for each such request.
        end: called with it `END_DELAY_S` later, unless the poller is closed before.
        clock: the time in seconds, by a clock that never goes back.
    """

    def __init__(
        self,
        cancel: Callable[[Watched], None],
        end: Callable[[Watched], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cancel = cancel
        self._end = end
        self._clock = clock
        self._watched: deque[Watched] = deque()
        self._cancelled: deque[tuple[float, Watched]] = deque()
        """What is still to be ended, and when, in that order."""
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="cancellation", daemon=True)
        self._thread.start()

    def watch(self, request: Watched) -> None:
        """Ask about `request` from time to time until it has ended."""
        with self._changed:
            self._watched.append(request)
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """End the thread, waiting at most `timeout_s` seconds for it."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while self._wait_for_turn():
            while self._cancelled and self._cancelled[0][0] <= self._clock():
                self._end(self._cancelled.popleft()[1])
            num_watched = len(self._watched)
            share = min(math.ceil(num_watched * TICK_S / POLL_INTERVAL_S), MAX_QUESTIONS_PER_TICK)
            for _ in range(num_watched):
                if share == 0:
                    break
                request = self._watched.popleft()
                if not request.ended:
                    self._ask_about(request)
                    share -= 1

    def _wait_for_turn(self) -> bool:
        """Wait for a request, then for the next tick; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._watched or self._cancelled)
            self._changed.wait_for(lambda: self._closed, timeout=TICK_S)
            return not self._closed

    def _ask_about(self, request: Watched) -> None:
        try:
            cancelled = request.is_cancelled()
        except Exception:
            logger.exception("cannot ask whether a request is cancelled; it is not asked about again")
            return
        if cancelled:
            self._cancelled.append((self._clock() + END_DELAY_S, request))
            self._cancel(request)
        else:
            self._watched.append(request)
