"""An engine or a scheduler that nothing brings back: every request is told, and a supervisor sees an end."""

from __future__ import annotations

import contextlib
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
from tests.serving.watch import Watch, kill_while_it_waits
from tritonclient.grpc import InferenceServerClient

from quire_client import Client, UnavailableError

SEATS = "--max-num-seqs=4"
CAUSE = "the GPU is lost: cudaEventQuery failed with cudaErrorIllegalAddress; the server ends"
LOST = "the scheduler was lost during the request"
DEAD_SCHEDULER = "the scheduler died (killed by SIGKILL); the server ends"


@pytest.fixture
def mortal(tmp_path: Path) -> Callable[[Path], Path]:
    """Makes a copy of a repository whose scheduler is that of mortal_scheduler.py."""
    return lambda original: copy_with(original, tmp_path / "mortal", "scheduler", "mortal_scheduler.py")


def copy_with(original: Path, copy: Path, model: str, code: str) -> Path:
    """Copy a repository, and have one of its models run another model.py, which lies beside this file."""
    shutil.copytree(original, copy)
    config = copy / model / "config.pbtxt"
    text = config.read_text()
    assert 'backend: "quire"' in text
    config.write_text(text.replace('backend: "quire"', 'backend: "python"'))
    shutil.copy(Path(__file__).with_name(code), copy / model / "1" / "model.py")
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
        assert_error(server, "the engine has been lost for")


@pytest.fixture
def impatient(repository: Path, tmp_path: Path) -> Path:
    """A copy of the repository whose frontends wait for no scheduler that died."""
    return copy_with(repository, tmp_path / "impatient", "llm", "impatient_frontend.py")


def test_a_scheduler_that_was_killed_ends_the_server_and_quire_serve_says_why(impatient: Path) -> None:
    with leaves_nothing(impatient, SEATS) as server:
        watch = Watch(server)
        kill_under_requests(server, watch, watch.kill_scheduler, LOST)
        assert server.wait() == 1
        assert_error(server, DEAD_SCHEDULER)
    assert sum("CRITICAL" in line and DEAD_SCHEDULER in line for line in server.lines) == 1


def test_a_frontend_that_was_killed_ends_the_server_and_with_it_the_streams_that_it_had(
    repository: Path,
) -> None:
    with leaves_nothing(repository, SEATS) as server, Client(server.ports.grpc_url) as client:
        watch = Watch(server)
        streams = [client.stream(PROMPT, **ENDLESS, timeout_s=120) for _ in range(16)]
        watch.wait_for_requests(len(streams))
        kill_while_it_waits(watch.frontends()[0])
        watch.close()
        for stream in streams:
            with pytest.raises(UnavailableError):
                stream.result()
        assert server.wait() == 1
        server.wait_for_line("error: the server cannot go on: one of its processes died (killed by SIGKILL)")


def test_a_scheduler_that_was_killed_ends_a_bare_server_with_a_status_that_is_not_0(impatient: Path) -> None:
    with bare_server(impatient, SMALL_POOL, SEATS) as server:
        tree, watch = server.tree(), Watch(server, server.process.pid)
        kill_under_requests(server, watch, watch.kill_scheduler, LOST)
        # Triton 2.51 often keeps llm loaded then, and gives up with 1 at its own exit timeout.
        assert server.wait() in (-signal.SIGKILL, 1)
        assert eventually(lambda: not any(is_running(pid) for pid in tree))
    assert sum("CRITICAL" in line and DEAD_SCHEDULER in line for line in server.lines) == 1


def test_a_scheduler_that_was_killed_may_be_loaded_again(repository: Path) -> None:
    by_hand = "--model-control-mode=explicit --load-model=*"
    with (
        bare_server(repository, SMALL_POOL, SEATS, triton_flags=by_hand) as server,
        Client(server.ports.grpc_url) as client,
        InferenceServerClient(server.ports.grpc_url) as operator,
    ):
        watch = Watch(server, server.process.pid)
        kill_under_requests(server, watch, watch.kill_scheduler, LOST)
        operator.unload_model("scheduler")
        operator.load_model("scheduler")

        def serves() -> bool:
            with contextlib.suppress(UnavailableError):
                return (
                    client.generate(PROMPT, max_tokens=4, temperature=0, timeout_s=30).num_output_tokens == 4
                )
            return False

        assert eventually(serves)


def assert_error(server: RunningServer, cause: str) -> None:
    """The server ends by itself or, as one of its processes is dead, is killed; both for the same cause."""
    error = server.wait_for_line("error: the server ").strip()
    assert error.startswith(
        (
            f"error: the server ended by itself: {cause}",
            f"error: the server cannot go on: {cause}",
        )
    )


def kill_under_requests(server: RunningServer, watch: Watch, kill: Callable[[], None], cause: str) -> None:
    """Have something die under requests that run and others that wait, all of which must be told why."""
    with Client(server.ports.grpc_url) as client:
        streams = [long_stream(server) for _ in range(4)]
        streams += [client.stream(PROMPT, **ENDLESS, timeout_s=120) for _ in range(12)]
        watch.wait_for_requests(len(streams))
        kill()
        watch.close()
        for stream in streams:
            with pytest.raises(UnavailableError, match=cause):
                stream.result()
