"""An engine that nothing brings back: every request is told, and the server ends for a supervisor to see."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.serving.running_server import (
    ENDLESS,
    PROMPT,
    SMALL_POOL,
    RunningServer,
    bare_server,
    eventually,
    is_running,
    leaves_nothing,
    long_stream,
)
from tests.serving.watch import Watch

from quire_client import Client, UnavailableError

SEATS = "--max-num-seqs=4"
CAUSE = "the GPU is lost: cudaEventQuery failed with cudaErrorIllegalAddress; the server ends"


@pytest.fixture
def mortal(tmp_path: Path) -> Callable[[Path], Path]:
    """Makes a copy of a repository whose scheduler is that of mortal_scheduler.py."""

    def copy(original: Path) -> Path:
        repository = Path(shutil.copytree(original, tmp_path / "mortal"))
        config = repository / "scheduler" / "config.pbtxt"
        text = config.read_text()
        assert 'backend: "quire"' in text
        config.write_text(text.replace('backend: "quire"', 'backend: "python"'))
        model = repository / "scheduler" / "1" / "model.py"
        shutil.copy(Path(__file__).with_name("mortal_scheduler.py"), model)
        return repository

    return copy


def test_a_dead_gpu_ends_the_server_and_quire_serve_says_why(
    mortal: Callable[[Path], Path], in_process_repository: Path
) -> None:
    repository = mortal(in_process_repository)
    with leaves_nothing(repository, SEATS) as server:
        watch = Watch(server)
        kill_under_requests(server, watch, (repository / "scheduler" / "1" / "dead").touch, CAUSE)
        assert server.wait() == 1
        server.wait_for_line(f"error: the server ended by itself: {CAUSE}")
    assert sum("CRITICAL" in line and CAUSE in line for line in server.lines) == 1


def test_a_dead_gpu_ends_a_bare_server_with_a_status_that_is_not_0(
    mortal: Callable[[Path], Path], in_process_repository: Path
) -> None:
    repository = mortal(in_process_repository)
    with bare_server(repository, SMALL_POOL, SEATS) as server:
        tree, watch = server.tree(), Watch(server, server.process.pid)
        kill_under_requests(server, watch, (repository / "scheduler" / "1" / "dead").touch, CAUSE)
        assert server.wait() == -signal.SIGKILL
        assert eventually(lambda: not any(is_running(pid) for pid in tree))
    assert sum("CRITICAL" in line and CAUSE in line for line in server.lines) == 1


def test_a_hosted_engine_that_was_killed_ends_the_server_and_quire_serve_says_why(
    mortal: Callable[[Path], Path], repository: Path
) -> None:
    with leaves_nothing(mortal(repository), SEATS) as server:
        watch = Watch(server)
        kill_under_requests(server, watch, watch.kill_engine, "the engine's process is gone")
        assert server.wait() == 1
        server.wait_for_line("error: the server ended by itself: the engine has been lost for")


def kill_under_requests(server: RunningServer, watch: Watch, kill: Callable[[], None], cause: str) -> None:
    """Have the engine die under requests that run and others that wait, all of which must be told why."""
    with Client(server.ports.grpc_url) as client:
        streams = [long_stream(server) for _ in range(4)]
        streams += [client.stream(PROMPT, **ENDLESS, timeout_s=120) for _ in range(12)]
        watch.wait_for_requests(len(streams))
        kill()
        watch.close()
        for stream in streams:
            with pytest.raises(UnavailableError, match=cause):
                stream.result()
