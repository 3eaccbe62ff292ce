"""Publishing a directory as a whole or not at all.

A build writes into a workspace beside its target and takes the target's place in one rename, so that a build
killed at any moment leaves the old repository as it was. What a killed build left behind is removed by the
next one.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quire.errors import BuildError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty directory; when the block ends without an exception it becomes `target`.

    What was at `target` before is then removed. After an exception `target` stays as it is.

    Raises:
        BuildError: another build of the same target is under way, or the target cannot be replaced.
    """
    target = target.resolve()
    workspace = target.with_name(f"{target.name}.quire-build")
    new, old = workspace / "new", workspace / "old"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(workspace, target)
    except OSError as error:
        raise BuildError(f"cannot write beside {target}: {error.strerror}") from error
    try:
        _clean(new, old, target)
        new.mkdir()
        yield new
        _replace(target, new, old)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
        os.close(lock)


def _lock(workspace: Path, target: Path) -> int:
    """Create the workspace and lock it for as long as this process lives."""
    while True:
        workspace.mkdir(exist_ok=True)
        try:
            descriptor = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue  # its owner finished just now
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if workspace.exists() and os.path.samestat(os.fstat(descriptor), workspace.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise BuildError(f"another build of {target} is under way; wait for it to end") from None
        os.close(descriptor)


def _clean(new: Path, old: Path, target: Path) -> None:
    """Undo what a killed build left behind."""
    if old.exists() and not target.exists():
        old.rename(target)
    for leftover in (new, old):
        if leftover.exists():
            shutil.rmtree(leftover)


def _replace(target: Path, new: Path, old: Path) -> None:
    """Put `new` at `target`."""
    try:
        if not target.exists():
            new.rename(target)
        elif not _exchange(new, target):
            # A file system without the exchange: for a moment there is no target. Of a build killed just
            # then the next one finds `old` and puts it back.
            target.rename(old)
            try:
                new.rename(target)
            except OSError:
                old.rename(target)
                raise
    except OSError as error:
        raise BuildError(f"cannot put the finished build at {target}: {error.strerror}") from error


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories in one system call (Linux); False where it is not to be had."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number))
