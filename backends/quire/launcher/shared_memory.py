"""The server's files in /dev/shm, and that none of them outlives it.

Triton removes them when it ends in peace. The launcher removes what a killed server left; what a server left
whose launcher was killed too is removed by the next start. Only a lock file tells which files those are: it
lies beside them under the same prefix, launcher and server hold a shared lock on it, and the kernel gives
that back whatever they died of.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

from quire.launcher.plan import SHM_DIR, SHM_PREFIX

_LOCK_NAME = "lock"


def hold(prefix: str) -> int:
    """Mark the files whose names begin with `prefix` as in use, for as long as a copy of the result is open.

    Returns:
        A file descriptor, which the server has to inherit.
    """
    final = SHM_DIR / f"{prefix}{_LOCK_NAME}"
    draft = final.with_name(f"{final.name}.draft")
    descriptor = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDONLY, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    draft.rename(final)  # Nobody ever sees it without its lock.
    return descriptor


def remove(prefix: str) -> None:
    """Remove the files of the server whose names begin with `prefix`."""
    for file in SHM_DIR.glob(f"{prefix}*"):
        file.unlink(missing_ok=True)


def remove_leftovers() -> None:
    """Remove the files of all servers that have ended and whose launchers could not do it."""
    for lock in SHM_DIR.glob(f"{SHM_PREFIX}*_{_LOCK_NAME}"):
        # It may be another user's, in use, or gone because another start was faster.
        with contextlib.suppress(OSError), lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(lock.name.removesuffix(_LOCK_NAME))
