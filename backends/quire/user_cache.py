"""Where Quire keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Quire's part of the user's cache, absolute; nobody has made it yet, perhaps."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    return (Path(chosen) if chosen else Path.home() / ".cache").absolute() / "quire"
