"""Ending a server that cannot serve any more, so that a supervisor starts another one."""

from __future__ import annotations

import logging
import signal
import threading

from quire.errors import PeerLostError
from quire.serving.rendezvous import Rendezvous

LAST_RESPONSES_S = 10.0
"""How long the server may take to send its last responses and unload its models."""

_log = logging.getLogger(__name__)


class ServerEnd:
    """Ends the server of this component, with an exit status that is not 0.

    SIGTERM has Triton send the responses that are under way, refuse new requests and unload its models. Then
    its exit status would be 0, as that of a server which somebody told to stop. So it is killed as soon as it
    unloads this component's model, when every response has been sent. Several components may do this at once:
    the reason of the first is told.

    Args:
        rendezvous: of the server; its launcher finds the reason there.
    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._rendezvous = rendezvous
        self._begun = False

    def begin(self, error: PeerLostError) -> None:
        """Have the server stop because of `error`."""
        self._begun = True
        if self._is_first(error):
            _log.critical("%s", error)
        self._rendezvous.server.signal(signal.SIGTERM)
        late = threading.Timer(LAST_RESPONSES_S, self.complete)
        late.daemon = True
        late.start()

    def complete(self) -> None:
        """Kill the server if it is to end; called when it unloads the model."""
        if self._begun:
            self._rendezvous.server.signal(signal.SIGKILL)

    def _is_first(self, error: PeerLostError) -> bool:
        try:
            return self._rendezvous.announce_end(str(error))
        except OSError:
            return True  # So at least the log has it.
