"""A real server for tests: `quire serve` as a child process on ports of the loopback interface."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quire_client import Client, SamplingOptions, TokenStream

QUIRE = Path(sys.executable).with_name("quire")
READY_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60
PROMPT = "Once upon a time"
ENDLESS = SamplingOptions(max_tokens=1900, temperature=100.0, seed=5)
"""Nearly uniform sampling that doesn't meet the end of the text: a request that takes seconds."""
SMALL_POOL = "--kv-cache-bytes=64MiB"
SHM_PREFIX = "triton_python_backend_shm_region_"
HEARING_SIGNALS = ("env", "--default-signal=INT,HUP")
"""Before a command: undo that whoever started the tests has these ignored, as nohup and a shell's `&` do.

Python's `preexec_fn` would do it in a copy of this process, where gRPC starts its threads again; they write
errors to the command's stderr.
"""


@dataclass(frozen=True, slots=True)
class Ports:
    """Three ports of the loopback interface for one server."""

    grpc: int
    http: int
    metrics: int

    @classmethod
    @contextlib.contextmanager
    def reserved(cls) -> Iterator[Ports]:
        """Ports that a server may listen on, and that nobody else is given before the block has ended.

        They stay bound here. That keeps them from other tests, which run at the same time and ask for any
        port, and not from servers, which like these sockets set SO_REUSEADDR.
        """
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for reserving in sockets:
                reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                reserving.bind(("127.0.0.1", 0))
            yield cls(*(bound.getsockname()[1] for bound in sockets))

    @property
    def flags(self) -> list[str]:
        return [
            f"--grpc-port={self.grpc}",
            f"--http-port={self.http}",
            f"--metrics-port={self.metrics}",
        ]

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.grpc}"

    @property
    def http_url(self) -> str:
        return f"127.0.0.1:{self.http}"


@dataclass(slots=True)
class RunningServer:
    """A child process that writes lines to stderr; every line is kept."""

    process: subprocess.Popen[str]
    ports: Ports
    lines: list[str] = field(default_factory=list)
    _arrived: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)

    @classmethod
    def start(cls, command: Sequence[str | Path], ports: Ports) -> RunningServer:
        process = subprocess.Popen(
            [*HEARING_SIGNALS, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        server = cls(process, ports)
        threading.Thread(target=server._read, daemon=True).start()
        return server

    def wait_for_line(self, text: str, timeout_s: float = READY_TIMEOUT_S) -> str:
        """The next line with `text` in it; fails the test if the output ends or time runs out first."""
        deadline = time.monotonic() + timeout_s
        while (remaining_s := deadline - time.monotonic()) > 0:
            try:
                line = self._arrived.get(timeout=remaining_s)
            except queue.Empty:
                break
            if line is None:
                raise AssertionError(f"the server ended without {text!r}; it said:\n{self.output}")
            if text in line:
                return line
        raise AssertionError(f"no {text!r} after {timeout_s} s; the server said:\n{self.output}")

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def tree(self) -> list[int]:
        """Process ids of the child and everything below it."""
        found = [self.process.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                found += [int(child) for child in children.split()]
        return found

    def shared_memory(self) -> set[Path]:
        """Files in /dev/shm through which the server talks to its components."""
        arguments: list[str] = []
        for pid in self.tree():
            with contextlib.suppress(OSError):
                arguments += Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        return {Path("/dev/shm") / argument for argument in arguments if argument.startswith(SHM_PREFIX)}

    def interrupt(self) -> None:
        """What Ctrl-C sends to `quire serve`."""
        self.process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Exit status, once the process has ended."""
        return self.process.wait(timeout_s)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))
            self._arrived.put(line)
        self._arrived.put(None)


@contextlib.contextmanager
def serving(repository: Path, *flags: str) -> Iterator[RunningServer]:
    """`quire serve` of a repository, ready when the block begins and gone when it has ended."""
    with started(repository, *flags) as server:
        server.wait_for_line("ready: gRPC")
        yield server


@contextlib.contextmanager
def started(repository: Path, *flags: str) -> Iterator[RunningServer]:
    """The same without waiting for it to be ready."""
    with Ports.reserved() as ports:
        server = RunningServer.start([QUIRE, "serve", repository, *ports.flags, *flags], ports)
        try:
            yield server
        finally:
            end(server)


@contextlib.contextmanager
def bare_server(repository: Path, *flags: str, triton_flags: str = "") -> Iterator[RunningServer]:
    """A tritonserver started without the launcher, ready when the block begins and gone when it has ended."""
    with Ports.reserved() as ports:
        line = printed_command(repository, *ports.flags, *flags).strip()
        server = RunningServer.start(["sh", "-c", f"exec {line} {triton_flags}"], ports)
        tree: list[int] = []
        shared_memory: set[Path] = set()
        try:
            server.wait_for_line("Started HTTPService")
            tree, shared_memory = server.tree(), server.shared_memory()
            yield server
        finally:
            end(server)
            clear_away(tree, shared_memory)


def printed_command(repository: Path, *flags: str) -> str:
    """The tritonserver command as `quire serve` prints it for a shell."""
    command: list[str | Path] = [QUIRE, "serve", repository, "--print-command", *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def leaves_nothing(repository: Path, *flags: str) -> Iterator[RunningServer]:
    """A ready server; after the block, which stops it, nothing of it must be left."""
    with serving(repository, SMALL_POOL, *flags) as server:
        tree, shared_memory = server.tree(), server.shared_memory()
        assert len(tree) >= 5, "quire, tritonserver and a process per model instance"
        assert rendezvous_folders(tree)
        assert any(file.exists() for file in shared_memory)
        yield server
        server.wait()
        assert eventually(lambda: not any(is_running(pid) for pid in tree))
        assert not any(file.exists() for file in shared_memory)
        assert rendezvous_folders(tree) == []


def rendezvous_folders(server_pids: list[int]) -> list[Path]:
    """Folders in which the processes of these servers meet."""
    runtime_dirs = {
        Path(os.environ.get("XDG_RUNTIME_DIR", tempfile.gettempdir())),
        Path(tempfile.gettempdir()),
    }
    return [path for folder in runtime_dirs for pid in server_pids for path in folder.glob(f"quire-{pid}-*")]


def long_stream(server: RunningServer) -> TokenStream:
    """A request that is under way: its first token has come."""
    stream = Client(server.ports.grpc_url).stream(PROMPT, **ENDLESS, timeout_s=120)
    next(stream)
    return stream


def eventually(holds: Callable[[], bool], timeout_s: float = 30) -> bool:
    """Whether something that can only be asked for comes true in time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def end(server: RunningServer) -> None:
    """Stop a server the kind way, then, if it takes too long, with everything below it."""
    tree = server.tree()
    if server.process.poll() is None:
        server.interrupt()
    try:
        server.wait()
    except subprocess.TimeoutExpired:
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.wait()


def clear_away(tree: Sequence[int], shared_memory: Iterable[Path]) -> None:
    """What a server that was killed leaves behind, where there is no launcher to do it."""
    for pid in filter(is_running, tree):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: not any(is_running(pid) for pid in tree))
    for file in shared_memory:
        file.unlink(missing_ok=True)


def is_running(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")
