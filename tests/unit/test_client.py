"""The client against a small gRPC server that speaks Triton's protocol, without Triton."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from quire_client import (
    AsyncClient,
    AsyncTokenStream,
    Client,
    InvalidRequestError,
    QuireClientError,
    RequestCancelledError,
    RequestTimeoutError,
    ServerFailureError,
    TokenStream,
    UnavailableError,
)
from quire_client.wire import MAX_TIMEOUT_S

EVENT_TIMEOUT_S = 20


def string(text: str) -> bytes:
    return struct.pack("<I", len(text.encode())) + text.encode()


def response(**tensors: bytes) -> Any:
    answer = service_pb2.ModelStreamInferResponse()
    for name, raw in tensors.items():
        answer.infer_response.outputs.add(name=name)
        answer.infer_response.raw_output_contents.append(raw)
    return answer


def delta(text: str, token_id: int) -> dict[str, bytes]:
    return {"text_output": string(text), "output_ids": np.array([token_id], np.int32).tobytes()}


def last(count: int) -> dict[str, bytes]:
    return {
        "finish_reason": string("length"),
        "num_input_tokens": np.array([3], np.int32).tobytes(),
        "num_output_tokens": np.array([count], np.int32).tobytes(),
    }


class EchoService(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers with the prompt's words one by one; some prompts have a meaning of their own."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.requests: list[dict[str, tuple[str, list[int], bytes]]] = []

    def ModelStreamInfer(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        (request,) = request_iterator
        inputs = {
            tensor.name: (tensor.datatype, list(tensor.shape), raw)
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        self.requests.append(inputs)
        prompt = inputs["text_input"][2][4:].decode() if "text_input" in inputs else "one two"
        if prompt.startswith("error "):
            yield service_pb2.ModelStreamInferResponse(error_message=prompt.removeprefix("error "))
            return
        if prompt == "truncated":
            yield response(**delta("half", 0))
            return
        if prompt == "endless":
            context.add_callback(self.cancelled.set)
            yield response(**delta("first", 0))
            self.cancelled.wait(EVENT_TIMEOUT_S)
            return
        words = prompt.split()
        if inputs["stream"][2] == b"\0":
            ids = np.arange(len(words), dtype=np.int32).tobytes()
            yield response(text_output=string(prompt), output_ids=ids, **last(len(words)))
            return
        for index, word in enumerate(words):
            end = last(len(words)) if index == len(words) - 1 else {}
            yield response(**delta(word, index), **end)

    def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerReadyResponse(ready=True)

    def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ServerMetadataResponse(name="triton", version="2.51.0")

    def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        answer = service_pb2.ModelMetadataResponse(name=request.name, versions=["1"])
        answer.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        answer.outputs.add(name="output_ids", datatype="INT32", shape=[-1])
        return answer


@pytest.fixture
def service() -> EchoService:
    return EchoService()


@pytest.fixture
def url(service: EchoService) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(16))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    service.cancelled.set()
    server.stop(grace=None).wait()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, timeout_s=EVENT_TIMEOUT_S) as client:
        yield client


def test_generate_returns_text_ids_reason_and_counts(client: Client) -> None:
    result = client.generate("a b c")
    assert (result.text, result.token_ids, result.finish_reason) == ("a b c", (0, 1, 2), "length")
    assert (result.num_input_tokens, result.num_output_tokens) == (3, 3)


def test_stream_yields_deltas_and_then_has_the_result(client: Client) -> None:
    stream = client.stream("a b c")
    assert [(delta.text, delta.token_ids) for delta in stream] == [("a", (0,)), ("b", (1,)), ("c", (2,))]
    assert stream.result().text == "abc"
    assert stream.result().num_output_tokens == 3


def test_options_arrive_with_their_types_and_omitted_ones_do_not(
    client: Client, service: EchoService
) -> None:
    client.generate([7, 8], max_tokens=5, temperature=0.5, seed=2**64 - 1, stop=["x", "yz"], top_k=None)
    (inputs,) = service.requests
    assert inputs["input_ids"] == ("INT32", [2], struct.pack("<2i", 7, 8))
    assert inputs["max_tokens"] == ("INT32", [1], struct.pack("<i", 5))
    assert inputs["temperature"] == ("FP32", [1], struct.pack("<f", 0.5))
    assert inputs["seed"] == ("UINT64", [1], b"\xff" * 8)
    assert inputs["stop"] == ("BYTES", [2], string("x") + string("yz"))
    assert inputs["exclude_input_in_output"] == ("BOOL", [1], b"\1")
    assert inputs.keys().isdisjoint({"top_k", "top_p", "min_p", "text_input"})


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (b"bytes", {}, "prompt is b'bytes'; it must be a string or a sequence of token ids"),
        (None, {}, "prompt is None; it must be"),
        (5, {}, "prompt is 5; it must be"),
        ({1: 2}, {}, "prompt is {1: 2}; it must be"),
        (np.array(5), {}, "prompt is array(5); it must be"),
        ([1, "a"], {}, "input_ids[1] is 'a'; it must be an integer from -2147483648 to 2147483647"),
        (
            [1, 2, 2**31],
            {},
            "input_ids[2] is 2147483648; it must be an integer from -2147483648 to 2147483647",
        ),
        (np.array([[1, 2]]), {}, "input_ids[0] is [1, 2]; it must be an integer"),
        ("a", {"stop": 5}, "stop is 5; it must be a string or a sequence of strings"),
        ("a", {"stop": b"x"}, "stop is b'x'; it must be a string or a sequence of strings"),
        ("a", {"stop": ["x", 5]}, "stop[1] is 5; it must be a string"),
        (
            "a",
            {"max_tokens": 99999999999},
            "max_tokens is 99999999999; it must be an integer from -2147483648 to 2147483647",
        ),
        ("a", {"max_tokens": True}, "max_tokens is True; it must be an integer"),
        ("a", {"seed": -1}, "seed is -1; it must be an integer from 0 to 18446744073709551615"),
        ("a", {"top_k": 1.5}, "top_k is 1.5; it must be an integer"),
        ("a", {"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ("a", {"temperature": 1e300}, "temperature is 1e+300; it must be a number from -3.4e38 to 3.4e38"),
        ("a", {"exclude_input_in_output": "no"}, "exclude_input_in_output is 'no'; it must be True or False"),
        ("a", {"temprature": 1.0}, "temprature is not an option of a request"),
        (
            "a",
            {"timeout_s": 1e300},
            "timeout_s is 1e+300; it must be a number of seconds from 0 to 1000000000",
        ),
        ("a", {"timeout_s": float("nan")}, "timeout_s is nan; it must be"),
        ("a", {"timeout_s": -1}, "timeout_s is -1; it must be"),
        ("a", {"timeout_s": "5"}, "timeout_s is '5'; it must be"),
    ],
    ids=str,
)
def test_what_cannot_be_sent_is_refused_with_field_value_and_limit(
    client: Client, service: EchoService, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(message)):
        client.generate(prompt, **options)
    assert not service.requests


@pytest.mark.parametrize("prompt", [(7, 8), range(7, 9), np.array([7, 8])], ids=str)
def test_any_sequence_of_token_ids_may_be_sent(client: Client, service: EchoService, prompt: Any) -> None:
    client.generate(prompt, timeout_s=MAX_TIMEOUT_S)
    assert service.requests[0]["input_ids"] == ("INT32", [2], struct.pack("<2i", 7, 8))


WRONG_URLS = [
    "http://localhost:8001",
    "localhost",
    "",
    "localhost:",
    ":8001",
    "::1",
    "h:0",
    "h:65536",
    "h:x",
    5,
]


@pytest.mark.parametrize("url", WRONG_URLS, ids=str)
@pytest.mark.parametrize("client_class", [Client, AsyncClient])
def test_a_url_that_is_not_host_and_port_is_refused(
    client_class: type[Client | AsyncClient], url: Any
) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(f"url is {url!r}; it must be host:port")):
        client_class(url)


@pytest.mark.parametrize("url", ["localhost:8001", "10.0.0.1:1", "[::1]:8001", "[fe80::1%eth0]:65535"])
def test_hosts_and_addresses_with_a_port_are_taken(url: str) -> None:
    Client(url).close()


@pytest.mark.parametrize(
    ("message", "expected", "sentence"),
    [
        ("INVALID_ARG: top_p is 2", InvalidRequestError, "top_p is 2"),
        ("UNSUPPORTED: no", InvalidRequestError, "no"),
        ("UNAVAILABLE: try again in 3 s", UnavailableError, "try again in 3 s"),
        ("CANCELLED: the client went away", RequestCancelledError, "the client went away"),
        ("INTERNAL: the step failed", ServerFailureError, "the step failed"),
        ("[request id: x] data-type is 'FP32'", InvalidRequestError, r"data-type is 'FP32'"),
        ("[request id: x] Server is stopping, scheduler for", UnavailableError, "Server is stopping"),
        ("Request for unknown model: 'llm' has no available versions", UnavailableError, "no available"),
        ("Request for unknown model: 'x' is not found", InvalidRequestError, "unknown model"),
        ("something else", ServerFailureError, "something else"),
    ],
)
async def test_server_errors_become_the_tree_with_the_servers_sentence(
    client: Client, url: str, message: str, expected: type[QuireClientError], sentence: str
) -> None:
    with pytest.raises(expected, match=sentence) as sync_error:
        client.generate(f"error {message}")
    async with AsyncClient(url) as async_client:
        with pytest.raises(expected) as async_error:
            await async_client.generate(f"error {message}")
    assert str(sync_error.value) == str(async_error.value)


def test_leaving_the_iteration_early_cancels_at_the_server(client: Client, service: EchoService) -> None:
    with client.stream("endless") as stream:
        assert next(stream).text == "first"
    assert service.cancelled.wait(EVENT_TIMEOUT_S)


def test_forgetting_a_stream_cancels_at_the_server(client: Client, service: EchoService) -> None:
    next(client.stream("endless"))
    assert service.cancelled.wait(EVENT_TIMEOUT_S)


def test_cancel_from_another_thread_ends_the_iteration(client: Client, service: EchoService) -> None:
    stream = client.stream("endless")
    next(stream)
    canceller = threading.Thread(target=stream.cancel)
    canceller.start()
    with pytest.raises(RequestCancelledError):
        next(stream)
    canceller.join()
    assert service.cancelled.wait(EVENT_TIMEOUT_S)


def test_a_request_that_takes_longer_than_its_timeout_ends_here_and_there(
    client: Client, service: EchoService
) -> None:
    with pytest.raises(RequestTimeoutError, match="not finished in the time"):
        client.generate("endless", timeout_s=0.3)
    assert service.cancelled.wait(EVENT_TIMEOUT_S)


def test_a_stream_without_its_last_response_is_a_failure(client: Client) -> None:
    with pytest.raises(ServerFailureError, match="last response"):
        client.generate("truncated")


def test_threads_share_a_client_and_get_their_own_texts(client: Client) -> None:
    prompts = [f"thread {number} of many" for number in range(64)]
    with futures.ThreadPoolExecutor(64) as pool:
        results = list(pool.map(lambda prompt: client.stream(prompt).result().text, prompts))
    assert results == [prompt.replace(" ", "") for prompt in prompts]


def test_health_and_model_info(client: Client) -> None:
    assert client.is_live()
    assert client.is_ready()
    info = client.model_info()
    assert (info.name, info.versions, info.server_version) == ("llm", ("1",), "2.51.0")
    assert info.inputs[0].datatype == "BYTES"
    assert info.outputs[0].shape == (-1,)


def test_without_a_server_requests_are_unavailable_and_health_is_false() -> None:
    with Client("127.0.0.1:1") as client:
        assert not client.is_live()
        assert not client.is_ready()
        unreachable = "cannot be reached; is it running at 127.0.0.1:1\\?"
        with pytest.raises(UnavailableError, match=unreachable):
            client.generate("a", timeout_s=EVENT_TIMEOUT_S)
        with pytest.raises(UnavailableError, match=unreachable):
            client.model_info()


DYING_SERVER = """
import os, signal
from concurrent import futures
import grpc
from tritonclient.grpc import service_pb2_grpc

class Service(service_pb2_grpc.GRPCInferenceServiceServicer):
    def ModelStreamInfer(self, request_iterator, context):
        next(request_iterator)
        os.kill(os.getpid(), signal.SIGKILL)

server = grpc.server(futures.ThreadPoolExecutor(1))
service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Service(), server)
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(port, flush=True)
server.wait_for_termination()
"""


@contextlib.contextmanager
def server_that_dies_of_a_request() -> Iterator[str]:
    with subprocess.Popen([sys.executable, "-c", DYING_SERVER], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


async def test_a_connection_lost_during_a_request_is_told_from_one_never_made() -> None:
    lost = "the connection to the server at {} was lost during the request"
    with server_that_dies_of_a_request() as url:
        client = Client(url)
        with client, pytest.raises(UnavailableError, match=lost.format(url)):
            client.generate("a", timeout_s=EVENT_TIMEOUT_S)
    with server_that_dies_of_a_request() as url:
        async with AsyncClient(url) as async_client:
            with pytest.raises(UnavailableError, match=lost.format(url)):
                await async_client.generate("a", timeout_s=EVENT_TIMEOUT_S)


async def test_async_client_generates_streams_and_describes(url: str) -> None:
    async with AsyncClient(url, timeout_s=EVENT_TIMEOUT_S) as client:
        assert (await client.generate("a b")).text == "a b"
        stream = client.stream("a b")
        assert [delta.text async for delta in stream] == ["a", "b"]
        assert (await stream.result()).text == "ab"
        assert await client.is_live()
        assert await client.is_ready()
        assert (await client.model_info()).name == "llm"


async def test_cancelling_a_task_cancels_its_request_at_the_server(url: str, service: EchoService) -> None:
    async with AsyncClient(url, timeout_s=EVENT_TIMEOUT_S) as client:
        stream = client.stream("endless")
        await anext(stream)
        task = asyncio.create_task(stream.result())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(service.cancelled.wait, EVENT_TIMEOUT_S)


async def test_async_stream_cancel_ends_the_iteration(url: str, service: EchoService) -> None:
    async with AsyncClient(url, timeout_s=EVENT_TIMEOUT_S) as client:
        stream = client.stream("endless")
        await anext(stream)
        stream.cancel()
        with pytest.raises(RequestCancelledError):
            await anext(stream)
        assert await asyncio.to_thread(service.cancelled.wait, EVENT_TIMEOUT_S)


@pytest.mark.parametrize(
    ("sync_class", "async_class"), [(Client, AsyncClient), (TokenStream, AsyncTokenStream)]
)
def test_the_async_client_is_the_twin_of_the_sync_one(sync_class: type, async_class: type) -> None:
    def methods(owner: type) -> dict[str, list[str]]:
        return {
            {"aclose": "close"}.get(name, name): list(inspect.signature(method).parameters)
            for name, method in inspect.getmembers(owner, inspect.isfunction)
            if not name.startswith("_")
        }

    assert methods(sync_class) == methods(async_class)


def test_the_client_needs_nothing_of_the_server_package() -> None:
    program = "import sys, quire_client; assert not {'quire', 'quire_build', 'torch'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)
