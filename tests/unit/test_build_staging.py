"""A directory is published as a whole or not at all, whatever happens to the process that builds it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quire.errors import BuildError
from quire_build import staging
from quire_build.staging import staged

KILLED_BUILD = """
import os, signal, sys
from pathlib import Path
from quire_build import staging

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

moment, target = sys.argv[1], Path(sys.argv[2])
if moment == "before the swap":
    staging._exchange = die
elif moment == "after the swap":
    exchange = staging._exchange
    staging._exchange = lambda new, old: exchange(new, old) and die()
elif moment == "between two renames":
    staging._exchange = lambda new, old: old.rename(new.with_name("old")) and die()
with staging.staged(target) as directory:
    (directory / "content").write_text("new")
    if moment == "half way":
        die()
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "repository"
    directory.mkdir()
    (directory / "content").write_text("old")
    return directory


def _publish(target: Path, content: str) -> None:
    with staged(target) as directory:
        assert list(directory.iterdir()) == []
        (directory / "content").write_text(content)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_finished_directory_takes_the_place_of_the_old_one(
    target: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    _publish(target, "new")
    assert (target / "content").read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_first_build_creates_its_parents(tmp_path: Path) -> None:
    _publish(tmp_path / "some" / "where" / "repository", "new")
    assert (tmp_path / "some" / "where" / "repository" / "content").read_text() == "new"


def test_a_failed_build_leaves_the_old_directory_and_nothing_else(target: Path) -> None:
    with pytest.raises(ValueError, match="bad weights"), staged(target) as directory:
        (directory / "content").write_text("half")
        raise ValueError("bad weights")
    assert (target / "content").read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(
    ("moment", "served"),
    [
        ("half way", "old"),
        ("before the swap", "old"),
        ("after the swap", "new"),
        # Only where the file system cannot exchange: the next build puts the old directory back first.
        ("between two renames", None),
    ],
)
def test_a_killed_build_leaves_a_whole_directory_and_the_next_one_cleans_up(
    target: Path, moment: str, served: str | None
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_BUILD, moment, str(target)], check=False)
    assert killed.returncode == -9
    if served is not None:
        assert (target / "content").read_text() == served
    with pytest.raises(ValueError), staged(target):
        raise ValueError
    assert (target / "content").read_text() == (served or "old")
    _publish(target, "newer")
    assert (target / "content").read_text() == "newer"
    assert list(target.parent.iterdir()) == [target]


def test_a_second_build_of_the_same_target_is_refused(target: Path) -> None:
    with staged(target) as directory:
        (directory / "content").write_text("first")
        with pytest.raises(BuildError, match="another build"):
            _publish(target, "second")
    assert (target / "content").read_text() == "first"
