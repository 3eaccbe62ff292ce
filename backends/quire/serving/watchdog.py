"""Noticing at once that another process has ended.

Triton's stubs outlive a killed server, and a BLS call to a killed stub never returns; both are found out
here by a thread that sleeps on the process's descriptor (pidfd), without polling. PR_SET_PDEATHSIG would
not do: it follows the thread that started the stub, and the server's loader threads come and go.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STUB_NAME = "triton_python_backend_stub"


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this machine, told apart from later ones with the same id by its start time."""

    pid: int
    start_time: int
    """In clock ticks since the machine started."""

    @classmethod
    def running(cls, pid: int) -> Process:
        """The process that has this id now.

        Raises:
            ProcessLookupError: there is none.
        """
        status = _status(pid)
        if status is None or status.ended:
            raise ProcessLookupError(f"no process {pid}")
        return cls(pid, status.start_time)

    def alive(self) -> bool:
        """Whether it still runs; a process that ended and was not collected yet does not."""
        status = _status(self.pid)
        return status is not None and status.start_time == self.start_time and not status.ended

    def cause_of_death(self) -> str | None:
        """What it died of, as long as its parent has not collected it; None before that and afterwards."""
        status = _status(self.pid)
        if status is None or status.start_time != self.start_time or not status.ended:
            return None
        return _cause_of_death(status.wait_status)

    def children(self) -> list[Process]:
        """Its children, those included that have ended and that it has not collected."""
        try:
            threads = list((Path("/proc") / str(self.pid) / "task").iterdir())
        except OSError:
            return []
        pids: list[int] = []
        for thread in threads:
            with contextlib.suppress(OSError):  # The thread has ended meanwhile.
                pids += map(int, (thread / "children").read_bytes().split())
        statuses = {pid: _status(pid) for pid in pids}
        return [Process(pid, status.start_time) for pid, status in statuses.items() if status is not None]

    def signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            if self.alive():
                os.kill(self.pid, number)

    def when_gone(self, call: Callable[[], None], *, name: str) -> None:
        """Call `call` once, from a daemon thread called `name`, as soon as the process has ended."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            descriptor = None
        threading.Thread(target=self._wait, args=(descriptor, call), name=name, daemon=True).start()

    def _wait(self, descriptor: int | None, call: Callable[[], None]) -> None:
        if descriptor is not None:
            # The id may have gone to another process before the descriptor was opened.
            if self.alive():
                poll = select.poll()
                poll.register(descriptor, select.POLLIN)
                poll.poll()
            os.close(descriptor)
        call()


def server_of_this_stub() -> int:
    """Process id of the server that started this stub; ends this process if the server is gone already.

    The parent alone doesn't tell: a stub whose server was killed while it loaded has another one, which lives
    on. Triton names the server among the stub's arguments too.
    """
    parent = os.getppid()
    command, *arguments = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    if Path(os.fsdecode(command)).name == STUB_NAME and str(parent).encode() not in arguments:
        os._exit(1)
    return parent


def exit_with_server(server_pid: int, clean_up: Callable[[], None]) -> None:
    """End this process as soon as the server `server_pid`, its parent, has ended; `clean_up` comes first."""

    def leave() -> None:
        try:
            clean_up()
        finally:
            # The stub's main thread waits for the server in C++ and would not hear of an exception.
            os._exit(1)

    try:
        server = Process.running(server_pid)
    except ProcessLookupError:
        leave()
    server.when_gone(leave, name="quire-watchdog")


@dataclass(frozen=True, slots=True)
class _Status:
    """What the kernel says about a process."""

    ended: bool
    """It is still there only because its parent has not collected it."""
    start_time: int
    wait_status: int
    """Of one that has ended, as from wait(2)."""


def _status(pid: int) -> _Status | None:
    """The state of a process, or None where there is none with this id.

    Fields follow the command name, which stands in brackets and may hold anything; as proc(5) counts, the
    state is the third field of all, the start time the 22nd and the wait status the 52nd.
    """
    try:
        fields = (Path("/proc") / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return _Status(fields[0] in (b"Z", b"X"), int(fields[19]), int(fields[49]))


def _cause_of_death(wait_status: int) -> str:
    code = os.waitstatus_to_exitcode(wait_status)
    if code >= 0:
        return f"exit status {code}"
    names = {number.value: number.name for number in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}"
