"""The folder in which the processes of one server start find each other."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from quire.errors import PeerLostError, StartupError
from quire.interface import ACCESS_KEY_BYTES
from quire.serving.rendezvous import MAX_SOCKET_PATH_BYTES, Rendezvous
from quire.serving.watchdog import Process

HOLD = """
import os, sys
from quire.serving.rendezvous import Rendezvous
rendezvous = Rendezvous.for_server(int(sys.argv[1]))
rendezvous.announce_engine()
rendezvous.announce_scheduler()
print(rendezvous.access_key.hex(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with TemporaryDirectory(prefix="q") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


@pytest.fixture
def holder(runtime_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder of this one."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_everything_in_the_folder_is_for_its_owner_only(runtime_dir: Path) -> None:
    rendezvous = Rendezvous.for_server(os.getpid())
    rendezvous.announce_engine()
    assert stat.S_IMODE(rendezvous.path.stat().st_mode) == 0o700
    files = list(rendezvous.path.iterdir())
    assert {file.name for file in files} == {"access_key", "engine"}
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    rendezvous.close()


def test_all_processes_of_a_server_get_one_key(runtime_dir: Path, holder: subprocess.Popen[str]) -> None:
    mine = Rendezvous.for_server(os.getpid())
    assert len(mine.access_key) == ACCESS_KEY_BYTES
    assert _first_line(holder) == mine.access_key.hex()
    mine.close()


def test_those_who_come_at_once_agree_on_the_key(runtime_dir: Path) -> None:
    barrier = threading.Barrier(8)
    opened: list[Rendezvous] = []

    def open_one() -> None:
        barrier.wait()
        opened.append(Rendezvous.for_server(os.getpid()))

    threads = [threading.Thread(target=open_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({rendezvous.access_key for rendezvous in opened}) == 1
    for rendezvous in opened:
        rendezvous.close()


def test_opening_while_others_leave_always_gets_a_folder_that_exists(runtime_dir: Path) -> None:
    def come_and_go() -> None:
        for _ in range(100):
            try:
                rendezvous = Rendezvous.for_server(os.getpid())
                assert (rendezvous.path / "access_key").read_bytes() == rendezvous.access_key
                rendezvous.close()
            except BaseException as error:
                failures.append(error)

    failures: list[BaseException] = []
    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(runtime_dir.iterdir()) == []


def test_the_last_to_leave_removes_the_folder(runtime_dir: Path, holder: subprocess.Popen[str]) -> None:
    mine = Rendezvous.for_server(os.getpid())
    _first_line(holder)
    mine.close()
    assert mine.path.exists()
    again = Rendezvous.for_server(os.getpid())
    assert again.access_key == mine.access_key
    holder.kill()
    holder.wait()
    again.close()
    assert not again.path.exists()


def test_the_launcher_can_remove_the_folder_whoever_holds_it(
    runtime_dir: Path, holder: subprocess.Popen[str]
) -> None:
    mine = Rendezvous.for_server(os.getpid())
    _first_line(holder)
    mine.remove()
    assert list(runtime_dir.iterdir()) == []


def test_folders_of_dead_servers_are_cleaned_up_and_held_ones_are_not(runtime_dir: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left_over = runtime_dir / f"quire-{ended.pid}-1"
    left_over.mkdir(mode=0o700)
    (left_over / "access_key").write_bytes(b"x")
    reused_id = runtime_dir / f"quire-{os.getpid()}-1"
    reused_id.mkdir(mode=0o700)
    unrelated = runtime_dir / "quire-notes"
    unrelated.mkdir()
    holder = subprocess.Popen(
        ["flock", "--shared", str(left_over), "sh", "-c", "echo; cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    _first_line(holder)

    first = Rendezvous.for_server(os.getpid())
    assert set(runtime_dir.iterdir()) == {first.path, left_over, unrelated}
    holder.communicate()
    first.close()

    second = Rendezvous.for_server(os.getpid())
    assert set(runtime_dir.iterdir()) == {second.path, unrelated}
    second.close()


def test_a_folder_that_others_may_enter_is_refused(runtime_dir: Path) -> None:
    rendezvous = Rendezvous.for_server(os.getpid())
    rendezvous.close()
    rendezvous.path.mkdir(mode=0o755)
    with pytest.raises(StartupError, match=r"mode 755.*remove it"):
        Rendezvous.for_server(os.getpid())


def test_a_link_in_place_of_the_folder_is_refused(runtime_dir: Path) -> None:
    rendezvous = Rendezvous.for_server(os.getpid())
    rendezvous.close()
    elsewhere = runtime_dir / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    rendezvous.path.symlink_to(elsewhere)
    with pytest.raises(StartupError, match="in the way"):
        Rendezvous.for_server(os.getpid())


def test_a_runtime_dir_too_long_for_a_socket_is_refused(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = runtime_dir / ("d" * MAX_SOCKET_PATH_BYTES)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(StartupError, match="XDG_RUNTIME_DIR"):
        Rendezvous.for_server(os.getpid())


def test_a_runtime_dir_that_zeromq_has_no_address_for_is_refused(
    runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latin = runtime_dir / os.fsdecode("größe".encode("latin-1"))
    latin.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(latin))
    with pytest.raises(StartupError, match="is not UTF-8; set XDG_RUNTIME_DIR"):
        Rendezvous.for_server(os.getpid())


def test_a_server_that_is_gone_has_no_folder(runtime_dir: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(StartupError, match=f"process {ended.pid}"):
        Rendezvous.for_server(ended.pid)


def test_the_engine_is_found_while_it_lives(runtime_dir: Path, holder: subprocess.Popen[str]) -> None:
    mine = Rendezvous.for_server(os.getpid())
    _first_line(holder)
    assert mine.engine() == Process.running(holder.pid)
    holder.kill()
    holder.wait()
    with pytest.raises(PeerLostError, match="gone"):
        mine.engine()
    mine.close()


def test_the_reason_of_the_end_is_there_once_it_was_announced(runtime_dir: Path) -> None:
    component, launcher = (Rendezvous.for_server(os.getpid()) for _ in range(2))
    assert launcher.reason_of_end() is None
    assert component.announce_end("the GPU is lost")
    assert not component.announce_end("it came first")
    component.close()
    assert launcher.reason_of_end() == "the GPU is lost"
    launcher.close()


def test_an_engine_not_loaded_yet_is_not_found(runtime_dir: Path) -> None:
    mine = Rendezvous.for_server(os.getpid())
    with pytest.raises(PeerLostError, match="not been loaded"):
        mine.engine()
    mine.close()


def test_the_scheduler_is_known_dead_or_alive_until_it_withdraws(
    runtime_dir: Path, holder: subprocess.Popen[str]
) -> None:
    mine = Rendezvous.for_server(os.getpid())
    _first_line(holder)
    scheduler = Process.running(holder.pid)
    assert mine.scheduler() == scheduler
    holder.kill()
    holder.wait()
    assert mine.scheduler() == scheduler
    mine.withdraw_scheduler()
    mine.withdraw_scheduler()
    assert mine.scheduler() is None
    mine.close()
