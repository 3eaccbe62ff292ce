"""Starting and stopping: what a server refuses to start with, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from tests.serving.running_server import (
    ENDLESS,
    PROMPT,
    QUIRE,
    SMALL_POOL,
    Ports,
    RunningServer,
    bare_server,
    end,
    eventually,
    is_running,
    leaves_nothing,
    long_stream,
    printed_command,
    rendezvous_folders,
    serving,
    started,
)

from quire_client import Client, QuireClientError


def test_ctrl_c_lets_requests_finish_and_leaves_nothing(repository: Path) -> None:
    with leaves_nothing(repository) as server:
        stream = long_stream(server)
        server.interrupt()
        server.wait_for_line("draining")
        result = stream.result()
        assert result.num_output_tokens == ENDLESS["max_tokens"]
        assert server.wait() == 0


def test_ctrl_c_on_an_idle_server_stops_within_the_exit_timeout(repository: Path) -> None:
    with leaves_nothing(repository, "--exit-timeout=10") as server:
        asked = time.monotonic()
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - asked < 10 + 5


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("address", ["localhost", "::1"] if has_ipv6() else ["localhost"])
def test_a_name_or_an_ipv6_address_can_be_listened_on(repository: Path, address: str) -> None:
    with serving(repository, f"--address={address}") as server:
        host = f"[{address}]" if ":" in address else address
        with Client(f"{host}:{server.ports.grpc}") as client:
            assert client.generate(PROMPT, max_tokens=2).num_output_tokens == 2


def test_a_server_that_drains_takes_no_new_requests(repository: Path) -> None:
    with leaves_nothing(repository) as server, Client(server.ports.grpc_url) as client:
        under_way = long_stream(server)
        server.interrupt()
        server.wait_for_line("draining")

        def refused() -> bool:
            try:
                client.generate(PROMPT, max_tokens=1, timeout_s=30)
            except QuireClientError:
                return True
            return False

        assert eventually(refused)
        under_way.cancel()


def test_a_second_ctrl_c_kills_at_once(repository: Path) -> None:
    with leaves_nothing(repository, "--exit-timeout=100") as server:
        streams = [long_stream(server) for _ in range(4)]
        server.interrupt()
        server.wait_for_line("draining")
        server.interrupt()
        server.wait_for_line("killing", timeout_s=10)
        assert server.wait(timeout_s=15) == 0
        for stream in streams:
            with pytest.raises(QuireClientError):
                stream.result()


def test_a_closed_terminal_drains_like_ctrl_c(repository: Path) -> None:
    with leaves_nothing(repository) as server:
        stream = long_stream(server)
        server.process.send_signal(signal.SIGHUP)
        assert stream.result().num_output_tokens == ENDLESS["max_tokens"]
        assert server.wait() == 0


def test_a_killed_launcher_takes_its_server_along_and_the_next_start_cleans_up(repository: Path) -> None:
    with serving(repository, SMALL_POOL) as server:
        tree, shared_memory = server.tree(), server.shared_memory()
        locks = {file.with_name(f"{file.name.rpartition('_')[0]}_lock") for file in shared_memory}
        assert [lock.exists() for lock in locks] == [True]
        server.process.kill()
        assert eventually(lambda: not any(is_running(pid) for pid in tree))
    with serving(repository, SMALL_POOL):
        assert not any(file.exists() for file in (*shared_memory, *locks))


def test_a_crashed_server_is_reported_and_its_components_end(repository: Path) -> None:
    with leaves_nothing(repository) as server:
        os.kill(server.tree()[1], signal.SIGKILL)
        assert server.wait() == 1
        assert "the server ended by itself" in server.output


def test_a_server_that_aborts_ends_whether_or_not_its_own_handler_ends_it(repository: Path) -> None:
    with leaves_nothing(repository) as server:
        triton = server.tree()[1]
        resource.prlimit(triton, resource.RLIMIT_CORE, (0, 0))
        os.kill(triton, signal.SIGABRT)
        server.wait_for_line("Signal (6) received.")
        error = server.wait_for_line("error: ")
        assert server.wait() == 1
    assert error.strip() in (
        "error: the server ended by itself: exit status -6",
        "error: the server crashed (signal 6) and did not end by itself",
    )


def test_it_stops_cleanly_as_process_1_of_a_container(repository: Path) -> None:
    namespace = ["unshare", "--pid", "--fork", "--mount-proc"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, "true"], capture_output=True).returncode
    ):
        pytest.skip("this user may not make a process namespace")
    with Ports.reserved() as ports:
        command: list[str | Path] = [*namespace, QUIRE, "serve", repository, SMALL_POOL, *ports.flags]
        server = RunningServer.start(command, ports)
        try:
            server.wait_for_line("ready: gRPC")
            tree, shared_memory = server.tree(), server.shared_memory()
            os.kill(tree[1], signal.SIGTERM)
            assert server.wait() == 0
            assert not any(is_running(pid) for pid in tree)
            assert not any(file.exists() for file in shared_memory)
        finally:
            end(server)


def test_a_second_server_on_the_same_ports_is_refused(server: RunningServer, repository: Path) -> None:
    refusal = refused_start(repository, *server.ports.flags)
    assert f"port {server.ports.grpc} for gRPC" in refusal
    assert "--grpc-port" in refusal


def test_a_bare_tritonserver_started_by_hand_serves_the_same_repository(
    repository: Path, client: Client
) -> None:
    with bare_server(repository, SMALL_POOL) as bare:
        tree = bare.tree()
        with Client(bare.ports.grpc_url) as bare_client:
            assert bare_client.is_ready()
            expected = client.generate(PROMPT, max_tokens=24, temperature=0)
            assert bare_client.generate(PROMPT, max_tokens=24, temperature=0) == expected
        bare.process.terminate()
        bare.wait()
        assert eventually(lambda: not any(is_running(pid) for pid in tree))
        assert rendezvous_folders(tree) == []


def test_paths_that_a_shell_would_take_apart_are_served(
    repository: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "my cache"))
    temporary = tmp_path_factory.mktemp("t")
    runtime_dir = temporary / "für mich"
    runtime_dir.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_dir))
    own = Path(shutil.copytree(repository, tmp_path / "my models; the 'új' $(ones)" / "repository"))
    with serving(own, SMALL_POOL) as server, Client(server.ports.grpc_url) as client:
        assert client.generate(PROMPT, max_tokens=8, temperature=0).num_output_tokens == 8


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--max-num-seqs", "max_num_seqs"),
        ("--max-num-batched-tokens", "max_num_batched_tokens"),
        ("--max-model-len", "max_model_len"),
    ],
)
def test_a_limit_above_the_engines_is_refused_at_start(repository: Path, flag: str, name: str) -> None:
    refusal = refused_start(repository, flag, "1000000")
    assert f"{name} is 1000000, but the engine was built for at most" in refusal


def test_a_bare_server_refuses_a_limit_above_the_engines_too(repository: Path) -> None:
    with Ports.reserved() as ports:
        refusal = subprocess.run(
            ["sh", "-c", printed_command(repository, *ports.flags)],
            env={**os.environ, "QUIRE_MAX_NUM_SEQS": "1000000"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert refusal.returncode == 1
    assert "max_num_seqs is 1000000, but the engine was built for at most" in refusal.stderr


def test_a_lower_limit_holds_for_requests(repository: Path) -> None:
    flags = ("--max-model-len=64", "--max-num-seqs=2", "--max-num-batched-tokens=32")
    with serving(repository, SMALL_POOL, *flags) as server, Client(server.ports.grpc_url) as client:
        with pytest.raises(QuireClientError, match=r"max_tokens is 500; .* \(max_model_len is 64\)"):
            client.generate(PROMPT, max_tokens=500)
        assert client.generate(PROMPT, max_tokens=8, temperature=0).num_output_tokens > 0


@pytest.fixture
def damaged(repository: Path, tmp_path: Path) -> Path:
    """A copy of the repository, to be damaged."""
    return Path(shutil.copytree(repository, tmp_path / "damaged"))


def test_a_corrupt_manifest_is_refused(damaged: Path) -> None:
    (damaged / "engine" / "1" / "engine.json").write_bytes(b"\x00garbage")
    assert "engine.json is damaged" in refused_start(damaged)


def test_a_repository_built_for_another_runtime_version_is_refused(damaged: Path) -> None:
    path = damaged / "engine" / "1" / "engine.json"
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps(manifest | {"runtime_version": "2020.1.0"}))
    refusal = refused_start(damaged)
    assert "2020.1.0" in refusal
    assert "quire build" in refusal


def test_an_engine_file_that_changed_after_the_build_is_refused(damaged: Path) -> None:
    model = damaged / "engine" / "1" / "model.onnx"
    model.write_bytes(model.read_bytes() + b"\0")
    assert "model.onnx has changed since it was built" in refused_start(damaged)


def test_a_missing_model_is_refused(damaged: Path) -> None:
    shutil.rmtree(damaged / "scheduler")
    assert "scheduler/config.pbtxt is missing" in refused_start(damaged)


def test_a_component_whose_process_is_killed_as_it_starts_is_not_waited_for(damaged: Path) -> None:
    stub = damaged / "engine" / "triton_python_backend_stub"
    stub.write_text("#!/bin/sh\n[ $# = 0 ] && exit 1\nkill -KILL $$\n")
    stub.chmod(0o755)
    refusal = refused_start(damaged)
    assert "a process of the server died while it loaded (killed by SIGKILL); not loaded: " in refusal
    assert "engine" in refusal.partition("not loaded: ")[2].partition(";")[0]


def test_a_component_whose_process_dies_as_it_starts_is_not_waited_for(damaged: Path) -> None:
    with Ports.reserved() as ports:
        words = shlex.split(printed_command(damaged, *ports.flags))
    backends = next(word for word in words if word.startswith("--backend-directory=")).partition("=")[2]
    # Triton prefers a model's own stub. Asked without arguments, one that is sound exits with 1.
    stub = damaged / "engine" / "triton_python_backend_stub"
    real = shlex.quote(f"{backends}/python/triton_python_backend_stub")
    stub.write_text(f"#!/bin/sh\n[ $# = 0 ] && exit 1\nexec {real} model.py region not-a-number 1 1 1 1 1\n")
    stub.chmod(0o755)
    refusal = refused_start(damaged)
    assert "a process of the server died as it started: terminate called" in refusal
    assert "(stol)" in refusal


def refused_start(repository: Path, *flags: str) -> str:
    """The one error line of a server that does not start, and that leaves nothing."""
    tree: set[int] = set()
    shared_memory: set[Path] = set()
    with started(repository, *flags) as server:
        while server.process.poll() is None:
            tree.update(server.tree())
            shared_memory |= server.shared_memory()
            time.sleep(0.02)
        line = server.wait_for_line("error: ")
        assert server.wait() == 1
    assert server.output.count("error: ") == 1
    assert "Traceback" not in server.output
    assert not any(is_running(pid) for pid in tree)
    assert not any(file.exists() for file in shared_memory)
    return line
