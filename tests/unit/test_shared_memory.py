"""What servers leave in /dev/shm, and who removes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quire.launcher import shared_memory
from quire.launcher.plan import SHM_PREFIX

PREFIX = f"{SHM_PREFIX}0123456789ab_"


@pytest.fixture(autouse=True)
def shm_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shared_memory, "SHM_DIR", tmp_path)
    return tmp_path


def test_files_of_a_server_that_runs_are_kept(shm_dir: Path) -> None:
    lock = shared_memory.hold(PREFIX)
    (shm_dir / f"{PREFIX}region").touch()
    shared_memory.remove_leftovers()
    assert (shm_dir / f"{PREFIX}region").exists()
    os.close(lock)


def test_files_of_a_server_outlive_its_launcher_and_not_the_server(shm_dir: Path) -> None:
    lock = shared_memory.hold(PREFIX)
    (shm_dir / f"{PREFIX}region").touch()
    server = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,), start_new_session=True
    )
    try:
        os.close(lock)
        shared_memory.remove_leftovers()
        assert (shm_dir / f"{PREFIX}region").exists()
    finally:
        server.kill()
        server.communicate()
    shared_memory.remove_leftovers()
    assert list(shm_dir.iterdir()) == []


def test_files_that_have_no_lock_are_somebody_elses(shm_dir: Path) -> None:
    os.close(shared_memory.hold(PREFIX))
    foreign = shm_dir / f"{SHM_PREFIX}another_region"
    foreign.touch()
    shared_memory.remove_leftovers()
    assert list(shm_dir.iterdir()) == [foreign]


def test_the_launcher_removes_its_own_server_files_lock_included(shm_dir: Path) -> None:
    lock = shared_memory.hold(PREFIX)
    (shm_dir / f"{PREFIX}region").touch()
    shared_memory.remove(PREFIX)
    assert list(shm_dir.iterdir()) == []
    os.close(lock)
