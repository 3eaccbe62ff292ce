"""One run of a server: start it, wait until it is ready, and stop it so that nothing is left.

The server runs in a session of its own, because Ctrl-C in a terminal reaches every process of the
foreground group and the components must live on until they have finished their requests. A first SIGINT,
SIGTERM or SIGHUP drains: the scheduler takes no new requests and answers when the last one has ended; then
the server gets SIGTERM, and what still lives at the end of the exit timeout is killed. A second signal kills
at once. Works as process 1 of a container too.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
import queue
import resource
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

from quire.errors import QuireError, StartupError
from quire.launcher import shared_memory
from quire.launcher.dead_children import DeadChildren
from quire.launcher.plan import SERVER_EXIT_TIMEOUT_S, LaunchPlan
from quire.launcher.scheduler_control import ask_scheduler
from quire.launcher.server_log import ServerLog
from quire.serving.rendezvous import Rendezvous

READY_POLL_S = 0.1
CHILDREN_POLL_S = 1.0
SIGNAL_POLL_S = 1.0
"""How long a wait lasts at a time: it does not end with a signal that another thread gets."""
FIRST_PROGRESS_S = 10.0
"""When the operator is told what loading waits for; then again each time that this long has doubled."""
CRASH_GRACE_S = 5.0
"""How long a server that crashed may take to end by itself.

It prints its stack first, with a run of addr2line for each frame: half a second in all for eight frames.
Where it crashed inside malloc, it may wait there for a lock of its own for ever. A core file that is still
being written when the time is over stays incomplete.
"""
STACK_BYTES = 1 << 30
"""Stack of each of the server's threads, if the system allows it: address space, of which only what is used
becomes memory. Triton's HTTP server puts a form's body, and each level of nested JSON, on its stack; with the
usual 8 MiB a form of 5 MB ends the server."""
LOG_TIMEOUT_S = 0.5
REAP_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class _Event(enum.Enum):
    STOP = enum.auto()
    EXITED = enum.auto()
    LOAD_FAILED = enum.auto()
    DRAINED = enum.auto()
    CRASHED = enum.auto()
    """It crashed some time ago and is still there."""


class _StopAtOnceError(Exception):
    """A second signal came."""


class ServerProcess:
    """A server started from a plan. `run` does it all, in the main thread.

    Args:
        plan: what to start.
        exit_timeout_s: seconds from the first signal until nothing is left.
        log: takes the server's output.
        report: called with one line for the operator at each stage.
        crash_grace_s: seconds from a crash until the server is killed.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        *,
        exit_timeout_s: float,
        log: ServerLog,
        report: Callable[[str], None],
        crash_grace_s: float = CRASH_GRACE_S,
    ) -> None:
        self._plan = plan
        self._exit_timeout_s = exit_timeout_s
        self._log = log
        self._report = report
        self._crash_grace_s = crash_grace_s
        self._crash_signal: int | None = None
        self._exited = threading.Event()
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._libc = ctypes.CDLL(None)

    def run(self) -> None:
        """Serve until a signal comes, then stop.

        Raises:
            StartupError: the server did not get ready.
            QuireError: it ended by itself, or cannot go on.
        """
        # Stubs whose server was killed become children of this process, which collects them.
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        shared_memory.remove_leftovers()
        with _signals_call(lambda: self._events.put(_Event.STOP)):
            process = self._spawn()
            rendezvous = None
            try:
                rendezvous = Rendezvous.for_server(process.pid)
                if self._wait_until_ready(process, rendezvous):
                    self._serve(process, rendezvous)
            except _StopAtOnceError:
                self._report("killing the server")
            finally:
                self._leave_nothing(process, rendezvous)
        self._report("stopped")

    def _spawn(self) -> subprocess.Popen[bytes]:
        lock = shared_memory.hold(self._plan.shm_prefix)
        process = subprocess.Popen(
            self._plan.argv,
            env={**os.environ, **self._plan.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
            preexec_fn=self._prepare_child,
        )
        assert process.stdout is not None
        self._log.follow(
            process.stdout,
            on_load_failure=lambda: self._events.put(_Event.LOAD_FAILED),
            on_crash=self._give_time_to_end,
        )
        threading.Thread(target=self._announce_exit, args=(process,), daemon=True).start()
        return process

    def _prepare_child(self) -> None:
        # A launcher that was killed cannot stop its server any more.
        self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
        allowed = STACK_BYTES if hard == resource.RLIM_INFINITY else min(hard, STACK_BYTES)
        if soft == resource.RLIM_INFINITY or soft < allowed:  # without a limit threads get 2 MiB
            resource.setrlimit(resource.RLIMIT_STACK, (allowed, hard))

    def _announce_exit(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._exited.set()
        self._events.put(_Event.EXITED)

    def _give_time_to_end(self, crash_signal: int) -> None:
        if self._crash_signal is None:
            self._crash_signal = crash_signal
            threading.Thread(target=self._announce_crash, daemon=True).start()

    def _announce_crash(self) -> None:
        if not self._exited.wait(self._crash_grace_s):
            self._events.put(_Event.CRASHED)

    def _crash_message(self) -> str:
        blocked = "" if self._exited.is_set() else " and did not end by itself"
        return f"the server crashed (signal {self._crash_signal}){blocked}"

    def _wait_until_ready(self, process: subprocess.Popen[bytes], rendezvous: Rendezvous) -> bool:
        """Whether the server got ready; False where a signal came first."""
        self._report("loading the models")
        began, told_after_s = time.monotonic(), FIRST_PROGRESS_S
        dead_children = DeadChildren(rendezvous.server)
        while not self._ready():
            now = time.monotonic()
            if (cause := dead_children.cause_of_death(now)) is not None:
                raise StartupError(
                    f"a process of the server died while it loaded ({cause}); {self._log.progress()}"
                )
            if now - began >= told_after_s:
                self._report(f"still loading after {told_after_s:g} s; {self._log.progress()}")
                told_after_s *= 2
            match self._next_event(READY_POLL_S):
                case _Event.STOP:
                    return False
                case _Event.LOAD_FAILED | _Event.EXITED:
                    self._log.wait_for_end(LOG_TIMEOUT_S)
                    raise StartupError(rendezvous.reason_of_end() or self._log.failure())
                case _Event.CRASHED:
                    raise StartupError(rendezvous.reason_of_end() or self._crash_message())
                case _:
                    pass
        self._log.open()
        return True

    def _ready(self) -> bool:
        endpoints = self._plan.endpoints
        url = f"http://{endpoints.local_url(endpoints.http_port)}/v2/health/ready"
        try:
            with _direct_http.open(url, timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _serve(self, process: subprocess.Popen[bytes], rendezvous: Rendezvous) -> None:
        endpoints = self._plan.endpoints
        self._report(
            f"ready: gRPC {endpoints.local_url(endpoints.grpc_port)}, "
            f"HTTP {endpoints.local_url(endpoints.http_port)}, "
            f"metrics {endpoints.local_url(endpoints.metrics_port)}/metrics; Ctrl-C stops"
        )
        if self._wait_for_end(rendezvous) is _Event.EXITED:
            reason = rendezvous.reason_of_end() or f"exit status {process.returncode}"
            raise QuireError(f"the server ended by itself: {reason}")
        deadline = time.monotonic() + self._exit_timeout_s
        reserved_s = min(SERVER_EXIT_TIMEOUT_S, self._exit_timeout_s / 2)  # for the server's own end
        self._drain(rendezvous.access_key, deadline - reserved_s)
        self._report("stopping the server")
        self._log.shut()
        process.terminate()
        self._wait_for(_Event.EXITED, deadline)
        if self._exited.is_set():
            self._log.wait_for_end(LOG_TIMEOUT_S)
        if self._crash_signal is not None:
            raise _failure(rendezvous, self._crash_message())

    def _wait_for_end(self, rendezvous: Rendezvous) -> _Event:
        """The signal to stop or the server's exit.

        Raises:
            QuireError: the server crashed and is still there, or a component's process died: its requests
                would never end, and nobody can load a model again here.
        """
        dead_children = DeadChildren(rendezvous.server)
        while (event := self._next_event(CHILDREN_POLL_S)) is None:
            if (cause := dead_children.cause_of_death(time.monotonic())) is not None:
                raise _failure(rendezvous, f"the server cannot go on: one of its processes died ({cause})")
        if event is _Event.CRASHED:
            raise _failure(rendezvous, self._crash_message())
        return event

    def _drain(self, access_key: bytes, deadline: float) -> None:
        """Let the requests that are under way finish, as far as there is time."""
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            return
        self._report("draining: no new requests; Ctrl-C again to kill")
        endpoints = self._plan.endpoints
        url = endpoints.local_url(endpoints.grpc_port)

        def drain() -> None:
            try:
                ask_scheduler(url, access_key, "drain", timeout_s=remaining_s)
            except QuireError as error:
                self._report(f"draining failed: {error}")
            self._events.put(_Event.DRAINED)

        threading.Thread(target=drain, daemon=True).start()
        self._wait_for(_Event.DRAINED, deadline)

    def _wait_for(self, awaited: _Event, deadline: float) -> None:
        """Wait for an event, the server's exit, a crash that it hangs after or the deadline."""
        while (remaining_s := deadline - time.monotonic()) > 0:
            match self._next_event(min(remaining_s, SIGNAL_POLL_S)):
                case _Event.STOP:
                    raise _StopAtOnceError
                case (_Event.EXITED | _Event.CRASHED) as over:
                    self._events.put(over)
                    return
                case event if event is awaited:
                    return

    def _next_event(self, timeout_s: float) -> _Event | None:
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def _leave_nothing(self, process: subprocess.Popen[bytes], rendezvous: Rendezvous | None) -> None:
        """Kill what is left of the server's group, and remove its shared memory and rendezvous folder."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + REAP_TIMEOUT_S
        while _collect_group(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        if rendezvous is not None:
            rendezvous.remove()
        shared_memory.remove(self._plan.shm_prefix)


def _failure(rendezvous: Rendezvous, otherwise: str) -> QuireError:
    """Why a server that was ready has to be killed: what a component said about it, if one did."""
    reason = rendezvous.reason_of_end()
    return QuireError(otherwise if reason is None else f"the server cannot go on: {reason}")


def _collect_group(group: int) -> bool:
    """Collect the ended children of a process group; whether any is left."""
    try:
        while os.waitpid(-group, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        return False
    return True


_direct_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""An HTTP client that ignores proxy variables: the server is on this machine."""


@contextlib.contextmanager
def _signals_call(handler: Callable[[], None]) -> Iterator[None]:
    """Call `handler` on SIGINT and SIGTERM, and on SIGHUP (the terminal is closed) unless under nohup.

    `SimpleQueue.put` may be called there: it is reentrant.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, lambda *_: handler()) for number in numbers}
    try:
        yield
    finally:
        for number, action in previous.items():
            signal.signal(number, action)
