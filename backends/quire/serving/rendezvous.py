"""Where the processes of one server start find each other: a private folder named after the server.

The folder holds the access key of this start, the scheduler's socket, and the process ids of scheduler and
engine. It is 0700 and is named after the server's process id and start time, since a process id may be used
again; every stub finds it by asking for its parent. Whoever comes first makes it, whoever goes last removes
it: each process keeps a shared lock on the folder while it lives, which the kernel gives back even after
`kill -9`, so that folders nobody holds are known to be left over. What is said over the socket is
`channel`'s business.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from quire.errors import PeerLostError, StartupError
from quire.interface import ACCESS_KEY_BYTES
from quire.serving.watchdog import Process

MAX_SOCKET_PATH_BYTES = 107
"""sun_path of a Unix socket, less its terminating zero."""
SOCKET_NAME = "scheduler.sock"

_FOLDER_NAME = re.compile(r"quire-(\d+)-(\d+)")


class Rendezvous:
    """The folder of one server start, held open. Use `for_server`.

    Attributes:
        path: the folder.
        server: the server's process.
        access_key: the secret of this start, `ACCESS_KEY_BYTES` long.
    """

    def __init__(self, path: Path, server: Process, lock: int, access_key: bytes) -> None:
        self.path = path
        self.server = server
        self.access_key = access_key
        self._lock = lock

    @classmethod
    def for_server(cls, pid: int) -> Rendezvous:
        """Open the folder of the running server `pid`, making it if this is the first to ask.

        Raises:
            StartupError: there is no such process, or the folder belongs to somebody else.
        """
        try:
            server = Process.running(pid)
        except ProcessLookupError:
            raise StartupError(f"no server runs as process {pid}") from None
        runtime_dir = _runtime_dir()
        path = runtime_dir / f"quire-{server.pid}-{server.start_time}"
        _check_socket_path(path / SOCKET_NAME)
        _remove_leftovers(runtime_dir)
        lock = _open_and_hold(path)
        try:
            return cls(path, server, lock, _shared_key(path / "access_key"))
        except OSError as error:
            os.close(lock)
            raise StartupError(f"cannot use {path}: {error.strerror}") from error

    @property
    def scheduler_endpoint(self) -> str:
        """ZeroMQ address at which the scheduler listens.

        ZeroMQ is given UTF-8. The interpreter in a stub may have decoded the path as something else.
        """
        return "ipc://" + os.fsencode(self.path / SOCKET_NAME).decode()

    def announce_scheduler(self) -> None:
        """Make this process known as the scheduler's."""
        _publish_this_process(self.path / "scheduler")

    def withdraw_scheduler(self) -> None:
        """From now on, there is no scheduler; so nobody misses it."""
        (self.path / "scheduler").unlink(missing_ok=True)

    def scheduler(self) -> Process | None:
        """The process that hosts the scheduler, dead or alive; None where none is loaded."""
        try:
            return _published_process(self.path / "scheduler")
        except OSError:
            return None

    def announce_engine(self) -> None:
        """Make this process known as the engine's."""
        _publish_this_process(self.path / "engine")

    def engine(self) -> Process:
        """The process that hosts the engine.

        Raises:
            PeerLostError: none has announced itself yet, or it is gone.
        """
        try:
            engine = _published_process(self.path / "engine")
        except OSError:
            raise PeerLostError("the engine has not been loaded yet") from None
        if not engine.alive():
            raise PeerLostError("the engine's process is gone")
        return engine

    def announce_end(self, reason: str) -> bool:
        """Make known why the server is about to end; whether nobody else had done so."""
        return _publish(self.path / "end", reason.encode(), replace=False)

    def reason_of_end(self) -> str | None:
        """Why the server ended, where a component has said so."""
        try:
            return (self.path / "end").read_text()
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Let go of the folder; the last one to do so removes it. May be called again."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            _remove_if_unheld(self.path, lock)
            os.close(lock)

    def remove(self) -> None:
        """Remove the folder whoever holds it: for the launcher, once the server is gone."""
        lock, self._lock = self._lock, -1
        shutil.rmtree(self.path, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def _runtime_dir() -> Path:
    chosen = os.environ.get("XDG_RUNTIME_DIR")
    if chosen and os.access(chosen, os.W_OK | os.X_OK):
        return Path(chosen)
    return Path(tempfile.gettempdir())


def _check_socket_path(path: Path) -> None:
    """Check that the scheduler can listen at `path`.

    Raises:
        StartupError: it is too long or no text.
    """
    encoded = os.fsencode(path)
    if len(encoded) > MAX_SOCKET_PATH_BYTES:
        raise StartupError(
            f"{path.parent} is too long for a socket; set XDG_RUNTIME_DIR to a folder with a shorter name"
        )
    try:
        encoded.decode()
    except UnicodeDecodeError:
        raise StartupError(f"{path.parent} is not UTF-8; set XDG_RUNTIME_DIR to a folder that is") from None


def _open_and_hold(path: Path) -> int:
    """Make the folder where needed and return a descriptor of it with a shared lock.

    Between opening and locking, the last holder may have removed the folder: then start over.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StartupError(f"{path} is in the way ({error.strerror}); remove it") from None
        try:
            _check_private(path, lock)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if _is_at(path, lock):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _check_private(path: Path, folder: int) -> None:
    status = os.fstat(folder)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o700:
        raise StartupError(
            f"{path} belongs to user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}; "
            f"it must belong to user {os.geteuid()} with mode 700: remove it"
        )


def _shared_key(path: Path) -> bytes:
    """The key in `path`, drawn now unless another process was faster."""
    if not path.exists():
        _publish(path, secrets.token_bytes(ACCESS_KEY_BYTES), replace=False)
    return path.read_bytes()


def _publish_this_process(path: Path) -> None:
    process = Process.running(os.getpid())
    _publish(path, f"{process.pid} {process.start_time}".encode())


def _published_process(path: Path) -> Process:
    pid, start_time = map(int, path.read_text().split())
    return Process(pid, start_time)


def _publish(path: Path, content: bytes, *, replace: bool = True) -> bool:
    """Write a 0600 file that others see whole or not at all; without `replace` the first one stays.

    Returns:
        Whether the file is now this one.
    """
    draft = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    if replace:
        draft.rename(path)
        return True
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        return False
    else:
        return True
    finally:
        draft.unlink()


def _remove_leftovers(runtime_dir: Path) -> None:
    """Remove folders whose server is gone and that no process holds.

    The lock decides: in a temporary folder that containers share, the server may be alive and yet not to
    be seen from here.
    """
    for path, server in _folders(runtime_dir):
        if server.alive():
            continue
        try:
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if os.fstat(folder).st_uid == os.geteuid():
                _remove_if_unheld(path, folder)
        finally:
            os.close(folder)


def _folders(runtime_dir: Path) -> Iterator[tuple[Path, Process]]:
    for path in runtime_dir.glob("quire-*"):
        if match := _FOLDER_NAME.fullmatch(path.name):
            yield path, Process(int(match[1]), int(match[2]))


def _remove_if_unheld(path: Path, lock: int) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    if _is_at(path, lock):
        shutil.rmtree(path, ignore_errors=True)


def _is_at(path: Path, folder: int) -> bool:
    """Whether the open folder is still the one that `path` names."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(folder))
    except FileNotFoundError:
        return False
