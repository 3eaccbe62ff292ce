"""Requests that are not running, in the order in which they will be admitted."""

from __future__ import annotations

from bisect import insort_left
from collections.abc import Iterator

from quire.scheduling.request import Request


class WaitingQueue:
    """First come, first served, or by priority.

    First come, first served: a preempted request goes back to the head. By priority: smallest priority
    first, then earliest arrival; a preempted request finds its place again.
    """

    def __init__(self, by_priority: bool) -> None:
        self._by_priority = by_priority
        # Last to first, because the next is taken far more often than one arrives.
        self._reversed: list[Request] = []

    def __len__(self) -> int:
        return len(self._reversed)

    def __iter__(self) -> Iterator[Request]:
        """From the next to be admitted to the last."""
        return reversed(self._reversed)

    def add(self, request: Request) -> None:
        """Queue a new request."""
        if self._by_priority:
            insort_left(self._reversed, request, key=lambda queued: (-queued.priority, -queued.arrival_order))
        else:
            self._reversed.insert(0, request)

    def put_back(self, request: Request) -> None:
        """Queue a preempted request."""
        if self._by_priority:
            self.add(request)
        else:
            self._reversed.append(request)

    def peek(self) -> Request:
        """The next request to be admitted; the queue must not be empty."""
        return self._reversed[-1]

    def pop(self) -> Request:
        """Take the next request; the queue must not be empty."""
        return self._reversed.pop()

    def drop_finished(self) -> None:
        """Remove the requests that have ended."""
        self._reversed = [request for request in self._reversed if not request.finished]
