"""Paths that Triton's Python backend can be given.

It starts each stub through `bash -c`, with a line that it makes of the backend directory and the model
repository without quoting. With a space or a quote in there the stub does not start, or ends at once, and
the server waits for it for ever; with `$(…)` something else would be run. And Python in the stub takes
ASCII only. Such a path is not handed over: a link to it is, in a folder of the user's own whose path is
plain. Links last, because a server started by hand with `quire serve --print-command` needs them too; those
that lead nowhere any more go when the next one is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tempfile
import uuid
from pathlib import Path

from quire.errors import StartupError
from quire.user_cache import user_cache

_PLAIN_CHARACTERS = "A-Za-z0-9_@%+=:,./-"
"""What a shell leaves as it is in every place, `shlex` says."""
_NAME_CHARACTERS = 40
"""Of the name of what a link leads to, for those who read the server's log."""


def plain_path(path: Path) -> Path:
    """The absolute `path` itself, or a link to it where a shell would not take it as one word.

    Raises:
        StartupError: a link is needed and there is no place for it.
    """
    character = _first_special(path)
    if character is None:
        return path
    try:
        return _link(_links_folder(), path)
    except OSError as error:
        raise StartupError(
            f"{path} has the character {character!r} in it, with which Triton's Python backend does not "
            f"start, and a link to it with a plain path cannot be made ({error}); use a path of a-z, A-Z, "
            "0-9 and any of _ @ % + = : , . / - alone, or set XDG_CACHE_HOME to a folder with such a path"
        ) from error


def _first_special(path: Path) -> str | None:
    match = re.search(f"[^{_PLAIN_CHARACTERS}]", os.fspath(path))
    return match[0] if match else None


def _links_folder() -> Path:
    """The folder for links, made where needed: in the cache, or among temporary files if that isn't plain.

    Raises:
        OSError: none of them can be used.
    """
    folder = user_cache() / "links"
    if _first_special(folder) is None:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = Path(tempfile.gettempdir()).absolute() / f"quire-links-{os.geteuid()}"
    if (character := _first_special(folder)) is not None:
        raise OSError(f"{user_cache()} and {folder} have such characters too, the latter {character!r}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    # Everybody may write to the folder around it.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise OSError(f"{folder} is not a folder that only user {os.geteuid()} may use: remove it")
    return folder


def _link(folder: Path, path: Path) -> Path:
    """The link to `path`, made unless it is there."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9.]+", "-", path.name)[:_NAME_CHARACTERS]
    link = folder / f"{name}-{digest}"
    if link.is_symlink() and link.readlink() == path:
        return link
    for other in folder.iterdir():
        if other.is_symlink() and not other.exists():
            other.unlink(missing_ok=True)
    draft = folder / f".{uuid.uuid4().hex}"
    draft.symlink_to(path)
    draft.rename(link)
    return link
