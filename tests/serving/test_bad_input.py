"""Bad input is refused with a sentence that names it, and the server goes on serving."""

from __future__ import annotations

import json
import queue
import struct
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from tests.serving.running_server import RunningServer
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from quire_client import Client, InvalidRequestError

NAN = float("nan")


@pytest.fixture(autouse=True)
def still_serving(client: Client) -> Iterator[None]:
    """After each of these tests, the server answers a good request."""
    yield
    assert client.generate("Once", max_tokens=2, temperature=0).num_output_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "text_input"),
        ([], {}, "input_ids"),
        ([5] * 2048, {"max_tokens": 1}, "2048 tokens; at most 2047"),
        ("word " * 200_000, {}, "text_input"),
        ([0, 10**6], {}, "token id 1000000"),
        ([0, -1], {}, "token id -1"),
        ("a", {"max_tokens": 0}, "max_tokens is 0"),
        ("a", {"max_tokens": 10**6}, "max_tokens is 1000000"),
        ("a", {"temperature": NAN}, "temperature is nan"),
        ("a", {"temperature": -1.0}, "temperature is -1"),
        ("a", {"top_p": 0.0}, "top_p is 0"),
        ("a", {"top_p": 2.0}, "top_p is 2"),
        ("a", {"top_p": NAN}, "top_p is nan"),
        ("a", {"top_k": -5}, "top_k is -5"),
        ("a", {"min_p": 1.5}, "min_p is 1.5"),
        ("a", {"stop": ["x"] * 17}, "stop has 17"),
        ("a", {"stop": [""]}, "stop"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_value_out_of_range_is_refused_by_name(
    client: Client, prompt: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        client.generate(prompt, **options)
    with pytest.raises(InvalidRequestError, match=message):
        client.stream(prompt, **options).result()


def test_invalid_utf8_is_refused(server: RunningServer) -> None:
    request = raw_request(("text_input", "BYTES", [1], packed(b"ab\xff\xfe")))
    assert "text_input is not valid UTF-8" in error_of(server, request)


def test_text_and_ids_together_or_neither_are_refused(server: RunningServer) -> None:
    text = ("text_input", "BYTES", [1], packed(b"a"))
    ids = ("input_ids", "INT32", [1], struct.pack("<i", 1))
    assert "text_input and input_ids" in error_of(server, raw_request(text, ids))
    assert "neither text_input nor input_ids" in error_of(server, raw_request())


@pytest.mark.parametrize(
    "tensor",
    [
        ("max_tokens", "FP32", [1], struct.pack("<f", 5)),
        ("max_tokens", "INT32", [2], struct.pack("<2i", 5, 5)),
        ("temperature", "INT32", [1], struct.pack("<i", 1)),
        ("stream", "BOOL", [1, 1], b"\1"),
        ("no_such_tensor", "INT32", [1], struct.pack("<i", 1)),
        ("max_tokens", "INT32", [1], b"\0"),
    ],
    ids=lambda tensor: f"{tensor[0]}-{tensor[1]}-{tensor[2]}",
)
def test_a_wrong_type_shape_or_name_is_refused(
    server: RunningServer, tensor: tuple[str, str, list[int], bytes]
) -> None:
    request = raw_request(("text_input", "BYTES", [1], packed(b"a")), tensor)
    assert tensor[0] in error_of(server, request)


def test_a_damaged_string_tensor_is_refused(server: RunningServer) -> None:
    request = raw_request(("text_input", "BYTES", [1], struct.pack("<I", 1000) + b"short"))
    assert "text_input" in error_of(server, request)


@pytest.mark.parametrize("model", ["engine", "scheduler"])
def test_a_request_to_an_internal_model_is_refused(server: RunningServer, model: str) -> None:
    """With every tensor in place and well formed, and a key that is not this start's."""
    with tritonclient.grpc.InferenceServerClient(server.ports.grpc_url) as triton:
        inputs = []
        for tensor in triton.get_model_metadata(model).inputs:
            shape = [max(size, 1) for size in tensor.shape]
            wire = tritonclient.grpc.InferInput(tensor.name, shape, tensor.datatype)
            wire.set_data_from_numpy(
                np.full(shape, b"statistics", np.object_)
                if tensor.datatype == "BYTES"
                else np.zeros(shape, {"INT32": np.int32, "UINT8": np.uint8}[tensor.datatype])
            )
            inputs.append(wire)
        with pytest.raises(InferenceServerException, match="Quire's own processes"):
            triton.infer(model, inputs, client_timeout=30)


def test_a_unary_call_of_the_decoupled_model_gets_tritons_own_refusal(server: RunningServer) -> None:
    with tritonclient.grpc.InferenceServerClient(server.ports.grpc_url) as triton:
        text = tritonclient.grpc.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([b"a"], np.object_))
        with pytest.raises(InferenceServerException, match="decoupled"):
            triton.infer("llm", [text], client_timeout=30)


def test_tritonclients_own_stream_gets_the_sentence_too(server: RunningServer) -> None:
    answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    with tritonclient.grpc.InferenceServerClient(server.ports.grpc_url) as triton:
        text = tritonclient.grpc.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([b"a"], np.object_))
        top_p = tritonclient.grpc.InferInput("top_p", [1], "FP32")
        top_p.set_data_from_numpy(np.array([2], np.float32))
        triton.start_stream(lambda result, error: answers.put((result, error)))
        triton.async_stream_infer("llm", [text, top_p])
        result, error = answers.get(timeout=30)
        triton.stop_stream()
    assert result is None
    assert str(error) == "INVALID_ARG: top_p is 2; it must be above 0 and at most 1"


def packed(string: bytes) -> bytes:
    return struct.pack("<I", len(string)) + string


def raw_request(*tensors: tuple[str, str, list[int], bytes]) -> Any:
    """A request for the model `llm` that no client library has checked."""
    request = service_pb2.ModelInferRequest(model_name="llm")
    for name, datatype, shape, raw in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    return request


def error_of(server: RunningServer, request: Any) -> str:
    """The one error that the request is answered with."""
    with grpc.insecure_channel(server.ports.grpc_url) as channel:
        service = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        (response,) = service.ModelStreamInfer(iter([request]), timeout=30)
        return str(response.error_message)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (json.dumps({"text_input": "w" * 8_000_000}), "application/x-www-form-urlencoded"),
        ('{"text_input":' + "[" * 1_000_000, "application/json"),
    ],
    ids=["a large form", "deep nesting"],
)
def test_a_body_that_wants_much_stack_is_refused_over_http(
    server: RunningServer, body: str, content_type: str
) -> None:
    """Triton takes both apart on a thread's stack."""
    request = urllib.request.Request(
        f"http://{server.ports.http_url}/v2/models/llm/generate",
        body.encode(),
        {"Content-Type": content_type},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    assert refused.value.code in (400, 500)
    refused.value.close()
