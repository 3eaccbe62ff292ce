"""A server that crashes or does not stop, played by a child that says so as Triton does."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from quire.errors import QuireError, StartupError
from quire.launcher.plan import SERVER_EXIT_TIMEOUT_S, SHM_DIR, SHM_PREFIX, Endpoints, LaunchPlan
from quire.launcher.server_log import ServerLog
from quire.launcher.server_process import ServerProcess
from quire.serving.rendezvous import Rendezvous

PATIENCE_S = 30
NEVER_S = 600.0
"""A grace period that is not over before the test is."""
CRASH = "Signal (6) received."
WORKING = "at work"
NOT_ENDED = r"^the server crashed \(signal 6\) and did not end by itself$"
DRAINING = "draining: no new requests; Ctrl-C again to kill"
STOPPING = "stopping the server"
KILLING = "killing the server"
_PR_SET_CHILD_SUBREAPER = 36

SERVER = """
import http.server, os, signal, socketserver, sys

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

port, ready, crash, ends = int(sys.argv[1]), sys.argv[2] == "True", sys.argv[3], sys.argv[4] == "True"
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
if ready:
    socketserver.TCPServer(("127.0.0.1", port), Health).handle_request()
print(crash, flush=True)
if ends:
    os._exit(7)
while True:
    signal.pause()
"""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the launcher takes from the process that it runs in, and leaves there."""
    with TemporaryDirectory(prefix="q") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0)


class Run:
    """One run of a server that crashes, once it is ready or before, and then ends or blocks for ever.

    It may say something else than that it crashed.
    """

    def __init__(self, *, ready: bool, ends: bool, says: str = CRASH) -> None:
        self._ready = ready
        self._ends = ends
        self._says = says
        self.reports: list[str] = []

    def __call__(
        self,
        *,
        crash_grace_s: float,
        exit_timeout_s: float = 0,
        see: Callable[[str], None] = lambda line: None,
        hear: Callable[[str], None] = lambda report: None,
    ) -> None:
        """Serve; `see` is called with each line of the server, `hear` with each report."""
        with socket.socket() as unbound:
            unbound.bind(("127.0.0.1", 0))
            port = unbound.getsockname()[1]
        prefix = f"{SHM_PREFIX}test-{uuid.uuid4().hex}_"
        words = (sys.executable, "-c", SERVER, str(port), str(self._ready), self._says, str(self._ends))
        lines: list[str] = []

        def take(line: str) -> None:
            lines.append(line)
            see(line)

        def note(report: str) -> None:
            self.reports.append(report)
            hear(report)

        try:
            ServerProcess(
                LaunchPlan(words, {}, Endpoints(http_port=port), prefix),
                exit_timeout_s=exit_timeout_s,
                log=ServerLog(take, verbose=True),
                report=note,
                crash_grace_s=crash_grace_s,
            ).run()
        finally:
            # Whatever the server died of, nothing is left of it.
            with pytest.raises(ProcessLookupError):
                os.killpg(int(lines[0]), 0)
            assert not list(SHM_DIR.glob(f"{prefix}*"))


def press_ctrl_c() -> None:
    """Straight to the main thread: it would be woken only after a while if another one got the signal."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def ctrl_c_at(said: str) -> Callable[[str], None]:
    """What sees lines of the server, and presses Ctrl-C at one of them."""

    def see(line: str) -> None:
        if line == said:
            press_ctrl_c()

    return see


def await_that_the_main_thread_waits() -> None:
    """Not for this thread, which leaves it time, but for something that does not come meanwhile."""
    state = Path(f"/proc/self/task/{os.getpid()}/syscall")
    waited = 0
    while waited < 10:
        time.sleep(0.01)
        waited = 0 if state.read_text().startswith("running") else waited + 1


def test_a_server_that_crashed_and_blocks_for_ever_is_ended() -> None:
    run = Run(ready=True, ends=False)
    with pytest.raises(QuireError, match=NOT_ENDED):
        run(crash_grace_s=0)
    assert any(line.startswith("ready: ") for line in run.reports)


def test_a_server_that_crashed_while_it_loaded_and_blocks_for_ever_is_ended() -> None:
    with pytest.raises(StartupError, match=NOT_ENDED):
        Run(ready=False, ends=False)(crash_grace_s=0)


def test_a_server_that_crashed_may_end_by_itself() -> None:
    with pytest.raises(QuireError, match=r"^the server ended by itself: exit status 7$"):
        Run(ready=True, ends=True)(crash_grace_s=NEVER_S)


def test_what_a_component_said_is_why_a_server_that_crashed_is_ended() -> None:
    components: list[Rendezvous] = []

    def say(line: str) -> None:
        if line.isdecimal():
            components.append(Rendezvous.for_server(int(line)))
            components[0].announce_end("the GPU is lost")

    with pytest.raises(QuireError, match=r"^the server cannot go on: the GPU is lost$"):
        Run(ready=True, ends=False)(crash_grace_s=0, see=say)
    components[0].close()


def test_ctrl_c_is_heard_while_a_server_that_crashed_has_time_to_end() -> None:
    run = Run(ready=True, ends=False)
    with pytest.raises(QuireError, match=NOT_ENDED):
        run(crash_grace_s=NEVER_S, see=ctrl_c_at(CRASH))
    assert run.reports[-1] == STOPPING


@pytest.mark.parametrize("ends", [False, True], ids=["blocks", "ends"])
@pytest.mark.parametrize("stage", [DRAINING, STOPPING])
def test_a_server_that_crashes_as_it_stops_has_crashed_and_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, stage: str, ends: bool
) -> None:
    """Its crash is read when that stage has begun, whether it then ends or blocks."""
    begun, over = threading.Event(), threading.Event()
    pids: list[int] = []

    def ask(*_: object, **__: object) -> str:
        if stage == DRAINING:
            over.wait(PATIENCE_S)
        return ""

    def interrupt(line: str) -> None:
        if line.isdecimal():
            pids.append(int(line))
        if line == CRASH:
            press_ctrl_c()
            assert begun.wait(PATIENCE_S)
            if ends:
                os.kill(pids[0], signal.SIGKILL)

    monkeypatch.setattr("quire.launcher.server_process.ask_scheduler", ask)
    asked = time.monotonic()
    try:
        with pytest.raises(QuireError, match=r"crashed \(signal 6\)$" if ends else NOT_ENDED):
            Run(ready=True, ends=False)(
                crash_grace_s=NEVER_S if ends else 0,
                exit_timeout_s=SERVER_EXIT_TIMEOUT_S + PATIENCE_S,
                see=interrupt,
                hear=lambda report: begun.set() if report == stage else None,
            )
    finally:
        over.set()
    assert time.monotonic() - asked < PATIENCE_S


def test_requests_get_half_of_a_short_exit_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []

    def ask(*_: object, timeout_s: float) -> str:
        times.append(timeout_s)
        return ""

    monkeypatch.setattr("quire.launcher.server_process.ask_scheduler", ask)
    run = Run(ready=True, ends=False, says=WORKING)
    run(
        crash_grace_s=NEVER_S, exit_timeout_s=1, see=ctrl_c_at(WORKING)
    )  # less than the server itself is given
    assert DRAINING in run.reports
    assert 0 < times[0] <= 0.5


def test_a_second_ctrl_c_that_another_thread_gets_is_heard_while_requests_finish(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The main thread waits then, and is not woken by that signal."""
    over = threading.Event()

    def press_again(*_: object, **__: object) -> str:
        await_that_the_main_thread_waits()
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        over.wait(PATIENCE_S)
        return ""

    monkeypatch.setattr("quire.launcher.server_process.ask_scheduler", press_again)
    run = Run(ready=True, ends=False, says=WORKING)
    asked = time.monotonic()
    try:
        run(
            crash_grace_s=NEVER_S,
            exit_timeout_s=SERVER_EXIT_TIMEOUT_S + PATIENCE_S,
            see=ctrl_c_at(WORKING),
        )
    finally:
        over.set()
    assert run.reports[-2:] == [KILLING, "stopped"]
    assert time.monotonic() - asked < PATIENCE_S
