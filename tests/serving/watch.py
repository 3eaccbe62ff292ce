"""What a running server's scheduler says about its requests."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.serving.running_server import RunningServer, eventually

from quire.launcher.scheduler_control import ask_scheduler
from quire.serving.rendezvous import Rendezvous

NOTICE_TIMEOUT_S = 30


class Watch:
    """The scheduler's own view of what it runs.

    Args:
        server: to watch.
        pid: of its tritonserver; None where `quire serve` has started it.
    """

    def __init__(self, server: RunningServer, pid: int | None = None) -> None:
        self._url = server.ports.grpc_url
        self._rendezvous = Rendezvous.for_server(pid or server.tree()[1])

    def statistics(self) -> dict[str, Any]:
        answer = ask_scheduler(self._url, self._rendezvous.access_key, "statistics", timeout_s=30)
        return dict(json.loads(answer))

    def wait_for_requests(self, count: int) -> None:
        """Return when this many requests run or wait, or fail."""
        deadline = time.monotonic() + NOTICE_TIMEOUT_S
        while (found := self._unfinished(self.statistics())) != count:
            assert time.monotonic() < deadline, f"{found} requests instead of {count}"

    def wait_until_all_is_free(self) -> None:
        """Return when no request is left and no block is owned, or fail."""
        self.wait_for_requests(0)
        statistics = self.statistics()
        assert statistics["free_blocks"] == statistics["blocks"] > 0

    def kill_engine(self) -> None:
        """Kill the process of a hosted engine."""
        kill_while_it_waits(self._rendezvous.engine().pid)

    def kill_scheduler(self) -> None:
        """Kill the scheduler's process."""
        scheduler = self._rendezvous.scheduler()
        assert scheduler is not None
        kill_while_it_waits(scheduler.pid)

    def frontends(self) -> list[int]:
        """The processes of the server that are neither scheduler nor hosted engine."""
        others = self._rendezvous.scheduler(), self._rendezvous.engine()
        return [child.pid for child in self._rendezvous.server.children() if child not in others]

    def close(self) -> None:
        self._rendezvous.close()

    @staticmethod
    def _unfinished(statistics: dict[str, Any]) -> int:
        return int(statistics["running_requests"] + statistics["waiting_requests"])


def kill_while_it_waits(pid: int) -> None:
    """Kill a component at a moment when all of its threads are in a system call, so most likely waiting.

    One that computes may hold a lock in the memory that it shares with Triton, which aborts when it meets the
    lock of a dead process.
    """
    tasks = Path(f"/proc/{pid}/task")

    def stopped() -> bool:
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()]
        return set(states) == {"T"}

    def waits() -> bool:
        os.kill(pid, signal.SIGSTOP)
        if eventually(stopped) and all(
            (task / "syscall").read_text().split()[0] != "-1" for task in tasks.iterdir()
        ):
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    assert eventually(waits)
    os.kill(pid, signal.SIGKILL)
