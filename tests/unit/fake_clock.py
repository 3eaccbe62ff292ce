"""A clock that stands still until a test sets it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FakeClock:
    """The time in seconds, as `time.monotonic` tells it."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now
