"""Noticing that another process has ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from quire.serving.watchdog import STUB_NAME, Process

PATIENCE_S = 30

STUB = """
import os, sys, time
from pathlib import Path
from quire.serving.watchdog import exit_with_server
exit_with_server(os.getppid(), Path(sys.argv[1]).unlink)
print(os.getpid(), flush=True)
time.sleep(600)
"""
SERVER = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]]).wait()
"""


def test_the_end_of_a_process_is_noticed_when_it_is_killed() -> None:
    process = subprocess.Popen(["sleep", "600"])
    gone = threading.Event()
    Process.running(process.pid).when_gone(gone.set, name="test")
    assert not gone.is_set()
    process.kill()
    assert gone.wait(PATIENCE_S)
    process.wait()


def test_a_process_that_ended_before_is_noticed_at_once() -> None:
    process = subprocess.Popen(["sleep", "600"])
    identity = Process.running(process.pid)
    process.kill()
    process.wait()
    assert not identity.alive()
    gone = threading.Event()
    identity.when_gone(gone.set, name="test")
    assert gone.wait(PATIENCE_S)


def test_another_process_with_the_same_id_is_not_mistaken() -> None:
    myself = Process.running(os.getpid())
    predecessor = Process(myself.pid, myself.start_time - 1)
    assert myself.alive()
    assert not predecessor.alive()
    gone = threading.Event()
    predecessor.when_gone(gone.set, name="test")
    assert gone.wait(PATIENCE_S)


def test_a_process_that_nobody_has_collected_does_not_count_as_alive() -> None:
    process = subprocess.Popen(["sleep", "600"])
    identity = Process.running(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not identity.alive()
    process.wait()


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (f"kill -{signal.SIGKILL} $$", "killed by SIGKILL"),
        (f"kill -{signal.SIGRTMIN + 1} $$", f"killed by signal {signal.SIGRTMIN + 1}"),
        ("exit 3", "exit status 3"),
    ],
)
def test_what_a_process_died_of_is_known_until_it_is_collected(end: str, cause: str) -> None:
    process = subprocess.Popen(["sh", "-c", f"read go; {end}"], stdin=subprocess.PIPE)
    identity = Process.running(process.pid)
    assert identity.cause_of_death() is None
    assert process.stdin is not None
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert identity.cause_of_death() == cause
    assert Process(identity.pid, identity.start_time - 1).cause_of_death() is None
    process.wait()
    assert identity.cause_of_death() is None


def test_children_of_every_thread_are_seen_until_they_are_collected() -> None:
    started: list[subprocess.Popen[bytes]] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: started.append(subprocess.Popen(["sleep", "600"])))
        thread.start()
        thread.join()
    started.append(subprocess.Popen(["sleep", "600"]))
    children = {Process.running(process.pid) for process in started}
    myself = Process.running(os.getpid())
    assert children <= set(myself.children())
    for process in started:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert children <= set(myself.children())
    for process in started:
        process.wait()
    assert not children & set(myself.children())


def test_a_stub_cleans_up_and_ends_with_its_killed_server(tmp_path: object) -> None:
    mark = f"{tmp_path}/mark"
    with open(mark, "w"):  # noqa: PTH123
        pass
    server = subprocess.Popen([sys.executable, "-c", SERVER, STUB, mark], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    stub = Process.running(int(server.stdout.readline()))
    gone = threading.Event()
    stub.when_gone(gone.set, name="test")
    server.kill()
    assert gone.wait(PATIENCE_S)
    assert not os.path.exists(mark)  # noqa: PTH110
    server.wait()


def run_as_stub(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What a child under the stub's name makes of the server that its arguments speak of."""
    code = "from quire.serving.watchdog import server_of_this_stub as server; print(server())"
    return subprocess.run(
        [f"/backends/python/{STUB_NAME}", "-c", code, *arguments],
        executable=sys.executable,
        # Under another name the interpreter doesn't find the environment that it belongs to.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_a_stub_knows_its_server() -> None:
    assert run_as_stub("model.py", str(os.getpid())).stdout == f"{os.getpid()}\n"


def test_a_stub_whose_server_was_gone_before_it_asked_ends() -> None:
    stub = run_as_stub("model.py", str(os.getpid() + 1))
    assert (stub.returncode, stub.stdout) == (1, "")
