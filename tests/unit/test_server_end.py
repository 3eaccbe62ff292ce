"""Ending a server that cannot serve any more; it is a child of the test."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from tempfile import TemporaryDirectory

import pytest

from quire.errors import EngineDeadError, PeerLostError
from quire.serving.rendezvous import Rendezvous
from quire.serving.server_end import ServerEnd

PATIENCE_S = 30
ERROR = EngineDeadError(
    "the GPU is lost: cudaEventQuery failed with cudaErrorIllegalAddress; the server ends"
)

STOPPING = """
import signal
signal.signal(signal.SIGTERM, lambda *_: print("stopping", flush=True))
print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def stopping() -> Iterator[subprocess.Popen[str]]:
    """A server that takes its time once it was told to stop."""
    process = subprocess.Popen([sys.executable, "-c", STOPPING], stdout=subprocess.PIPE, text=True)
    assert line_of(process) == "ready"
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def rendezvous(stopping: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Rendezvous]:
    with TemporaryDirectory(prefix="q") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        rendezvous = Rendezvous.for_server(stopping.pid)
        yield rendezvous
        rendezvous.remove()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_the_server_is_told_to_stop_and_killed_when_it_unloads_the_scheduler(
    stopping: subprocess.Popen[str], rendezvous: Rendezvous, caplog: pytest.LogCaptureFixture
) -> None:
    end = ServerEnd(rendezvous)
    end.begin(ERROR)
    assert line_of(stopping) == "stopping"
    assert rendezvous.reason_of_end() == str(ERROR)
    assert [(record.levelno, record.message) for record in caplog.records] == [(logging.CRITICAL, str(ERROR))]
    end.complete()
    assert stopping.wait(PATIENCE_S) == -signal.SIGKILL
    end.complete()  # a server that has gone is nobody's to kill


def test_a_server_that_does_not_unload_the_scheduler_in_time_is_killed(
    stopping: subprocess.Popen[str], rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.serving.server_end.LAST_RESPONSES_S", 0.0)
    ServerEnd(rendezvous).begin(ERROR)
    assert stopping.wait(PATIENCE_S) == -signal.SIGKILL


def test_a_server_ends_even_if_the_reason_cannot_be_written(
    stopping: subprocess.Popen[str], rendezvous: Rendezvous, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Rendezvous, reason: str) -> bool:
        raise OSError("No space left on device")

    monkeypatch.setattr(Rendezvous, "announce_end", full)
    ServerEnd(rendezvous).begin(ERROR)
    assert line_of(stopping) == "stopping"


def test_of_two_components_that_end_the_server_one_says_why(
    stopping: subprocess.Popen[str], rendezvous: Rendezvous, caplog: pytest.LogCaptureFixture
) -> None:
    ends = [ServerEnd(rendezvous), ServerEnd(rendezvous)]
    ends[0].begin(ERROR)
    ends[1].begin(PeerLostError("another reason"))
    assert line_of(stopping) == "stopping"
    assert rendezvous.reason_of_end() == str(ERROR)
    assert [record.message for record in caplog.records] == [str(ERROR)]
    ends[1].complete()
    assert stopping.wait(PATIENCE_S) == -signal.SIGKILL
    ends[0].complete()


def test_a_server_whose_engine_lives_is_left_alone(
    stopping: subprocess.Popen[str], rendezvous: Rendezvous
) -> None:
    ServerEnd(rendezvous).complete()
    assert stopping.poll() is None
