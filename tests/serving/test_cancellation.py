"""A request that nobody waits for any more gives back what it holds, however its client went away."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.serving.running_server import ENDLESS, HEARING_SIGNALS, PROMPT, QUIRE, RunningServer, serving
from tests.serving.watch import Watch

from quire_client import AsyncClient, Client, RequestCancelledError, RequestTimeoutError


@pytest.fixture
def watch(server: RunningServer) -> Iterator[Watch]:
    watch = Watch(server)
    watch.wait_until_all_is_free()
    yield watch
    watch.wait_until_all_is_free()
    watch.close()


def test_a_closed_stream_frees_its_blocks(watch: Watch, client: Client) -> None:
    with client.stream(PROMPT, **ENDLESS) as stream:
        next(stream)
        statistics = watch.statistics()
        assert statistics["running_requests"] == 1
        assert statistics["free_blocks"] < statistics["blocks"]
    watch.wait_until_all_is_free()


def test_a_cancelled_stream_ends_with_its_error(watch: Watch, client: Client) -> None:
    stream = client.stream(PROMPT, **ENDLESS)
    next(stream)
    stream.cancel()
    with pytest.raises(RequestCancelledError):
        stream.result()


def test_a_timeout_cancels_a_request_that_does_not_stream(watch: Watch, client: Client) -> None:
    with pytest.raises(RequestTimeoutError):
        client.generate(PROMPT, timeout_s=0.2, **ENDLESS)


def test_a_closed_connection_cancels_all_its_requests(watch: Watch, server: RunningServer) -> None:
    with Client(server.ports.grpc_url) as client:
        streams = [client.stream(PROMPT, **ENDLESS) for _ in range(32)]
        for stream in streams:
            next(stream)
    watch.wait_until_all_is_free()


def test_cancelled_tasks_free_their_blocks(watch: Watch, server: RunningServer) -> None:
    async def start_and_cancel() -> None:
        async with AsyncClient(server.ports.grpc_url) as client:
            tasks = [asyncio.create_task(client.generate(PROMPT, **ENDLESS)) for _ in range(16)]
            await asyncio.to_thread(watch.wait_for_requests, 16)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)

    asyncio.run(start_and_cancel())


def test_streams_cancelled_together_do_not_crash_the_server(in_process_repository: Path) -> None:
    """Threads of the gRPC frontend that fall behind leave ends of writes in its queue while requests end."""

    async def start_and_cancel(url: str) -> None:
        async with AsyncClient(url, timeout_s=120) as client:
            streams = [client.stream(PROMPT, **ENDLESS) for _ in range(256)]
            await asyncio.gather(*(anext(aiter(stream)) for stream in streams))
            for stream in streams:
                stream.cancel()

    with serving(in_process_repository, "--kv-cache-bytes=512MiB") as server:
        make_grpc_threads_wait_for_others(server.tree()[1])
        for _ in range(20):
            asyncio.run(start_and_cancel(server.ports.grpc_url))
        with Client(server.ports.grpc_url) as client:
            assert client.generate(PROMPT, max_tokens=2, temperature=0).num_output_tokens == 2
        server.interrupt()
        assert server.wait() == 0, server.output


def make_grpc_threads_wait_for_others(tritonserver: int) -> None:
    """Have the threads that gRPC's server has started, and those after them, come after all others.

    By their niceness: idle threads would get nothing for minutes where other tests keep all cores busy.
    """
    threads = sorted(Path(f"/proc/{tritonserver}/task").iterdir(), key=lambda path: int(path.name))
    names = [(path / "comm").read_text().strip() for path in threads]
    for path in threads[names.index("timer_manager") :]:
        os.setpriority(os.PRIO_PROCESS, int(path.name), 19)


def test_an_http_client_that_hangs_up_frees_its_blocks(watch: Watch, server: RunningServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.ports.http, timeout=60)
    body = {"text_input": PROMPT, "stream": True, **ENDLESS}
    connection.request("POST", "/v2/models/llm/generate_stream", json.dumps(body))
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    answer.close()
    connection.close()
    watch.wait_until_all_is_free()


def test_ctrl_c_in_quire_generate_cancels_without_a_traceback(watch: Watch, server: RunningServer) -> None:
    command = [*HEARING_SIGNALS, str(QUIRE), "generate", PROMPT, "--url", server.ports.grpc_url]
    command += ["--max-tokens", "1900", "--temperature", "100", "--seed", "5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b""


def test_quire_generate_prints_the_text_that_the_client_gets(server: RunningServer, client: Client) -> None:
    expected = client.generate(PROMPT, max_tokens=24, temperature=0).text
    for flags in ([], ["--no-stream"]):
        command = [str(QUIRE), "generate", PROMPT, "--url", server.ports.grpc_url, *flags]
        command += ["--max-tokens", "24", "--temperature", "0"]
        assert subprocess.run(command, capture_output=True, check=True).stdout.decode() == expected + "\n"
