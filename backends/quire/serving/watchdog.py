"""Noticing at once that another process has ended.

Triton's stubs outlive a killed server, and a BLS call to a killed stub never returns; both are found out
here by a thread that sleeps on the process's descriptor (pidfd), without polling. PR_SET_PDEATHSIG would
not do: it follows the thread that started the stub, and the server's loader threads come and go.
"""

from __future__ import annotations

import contextlib
import os
import select
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
        start_time = _start_time(pid)
        if start_time is None:
            raise ProcessLookupError(f"no process {pid}")
        return cls(pid, start_time)

    def alive(self) -> bool:
        """Whether it still runs; a process that ended and was not collected yet does not."""
        return _start_time(self.pid) == self.start_time

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


def _start_time(pid: int) -> int | None:
    """Start time of a process in clock ticks, or None where it has ended.

    Fields follow the command name, which stands in brackets and may hold anything; the state comes first
    and the start time is the 22nd field of all, as proc(5) counts.
    """
    try:
        fields = (Path("/proc") / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
