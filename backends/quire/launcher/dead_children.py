"""Noticing that a server waits for a process that has died.

While it loads a model, Triton waits for ever for a stub that was killed, by the OOM killer say; later the
requests that were given to that stub wait for ever. It stays a zombie, and nothing is logged.
"""

from __future__ import annotations

from quire.serving.watchdog import Process

UNCOLLECTED_S = 5.0
"""How long a child stays dead and uncollected until that means that the server waits for it.

Children that end in order, such as a stub whose component refused to load, are collected at once; the rest is
patience with a machine that has no time for the server.
"""


class DeadChildren:
    """The children of a server that have died and that it does not collect.

    Args:
        server: whose children are looked at.
    """

    def __init__(self, server: Process) -> None:
        self._server = server
        self._dead_since: dict[Process, float] = {}

    def cause_of_death(self, now: float) -> str | None:
        """What a child died of that has been dead for `UNCOLLECTED_S`, as far as earlier calls have seen.

        Args:
            now: the time in seconds, by a clock that never goes back.
        """
        causes = {child: child.cause_of_death() for child in self._server.children()}
        self._dead_since = {
            child: self._dead_since.get(child, now) for child, cause in causes.items() if cause is not None
        }
        for child, since in self._dead_since.items():
            if now - since >= UNCOLLECTED_S:
                return causes[child]
        return None
