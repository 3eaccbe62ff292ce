"""Noticing that another process has ended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

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
