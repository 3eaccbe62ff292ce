"""Noticing that the scheduler's process has died, which nobody but a frontend can tell.

Triton does not load the model again by itself and goes on calling itself ready; were it left alone, frontends
would refuse requests for ever. A scheduler that is unloaded in order withdraws from the rendezvous first, and
one that still loads has not announced itself yet, so that neither is taken for dead.
"""

from __future__ import annotations

from collections.abc import Callable

from quire.errors import PeerLostError
from quire.serving.rendezvous import Rendezvous
from quire.serving.watchdog import Process

SCHEDULER_RETURN_S = 30.0
"""How long an operator has to load a scheduler that died again (Triton's explicit model control)."""


class DeadSchedulerWatch:
    """Calls for the server's end when its scheduler has been dead for `SCHEDULER_RETURN_S`.

    Args:
        rendezvous: where the scheduler announces itself.
        end_server: called once, when no request can be under way any more.
    """

    def __init__(self, rendezvous: Rendezvous, end_server: Callable[[PeerLostError], None]) -> None:
        self._rendezvous = rendezvous
        self._end_server = end_server
        self._dead: Process | None = None
        self._dead_since = 0.0
        self._ended = False

    def check(self, now: float) -> None:
        """Look whether the scheduler is dead; called again and again while none answers.

        Args:
            now: the time in seconds, by a clock that never goes back.
        """
        scheduler = self._rendezvous.scheduler()
        if self._ended or scheduler is None or scheduler.alive():
            self._dead = None
            return
        if scheduler != self._dead:
            self._dead, self._dead_since = scheduler, now
        if now - self._dead_since >= SCHEDULER_RETURN_S:
            self._ended = True
            cause = scheduler.cause_of_death() or "its process is gone"
            self._end_server(PeerLostError(f"the scheduler died ({cause}); the server ends, try again later"))
