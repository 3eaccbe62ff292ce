"""Between the client's data and Triton's gRPC messages; no connection is touched here.

Each request is a stream of its own (`ModelStreamInfer` with one request in it) on a shared connection:
its end is the request's end and cancelling it cancels the request, with no table of request ids between.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from quire_client.errors import (
    InvalidRequestError,
    QuireClientError,
    RequestCancelledError,
    RequestTimeoutError,
    ServerFailureError,
    UnavailableError,
)
from quire_client.types import Delta, GenerateResult, ModelInfo, Prompt, SamplingOptions, TensorInfo

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)

_OPTION_TYPES = {
    "max_tokens": ("INT32", "<i"),
    "temperature": ("FP32", "<f"),
    "top_k": ("INT32", "<i"),
    "top_p": ("FP32", "<f"),
    "min_p": ("FP32", "<f"),
    "seed": ("UINT64", "<Q"),
    "exclude_input_in_output": ("BOOL", "?"),
}

_ERROR_OF_CODE: dict[str, type[QuireClientError]] = {
    "INVALID_ARG": InvalidRequestError,
    "UNSUPPORTED": InvalidRequestError,
    "NOT_FOUND": InvalidRequestError,
    "UNAVAILABLE": UnavailableError,
    "CANCELLED": RequestCancelledError,
    "INTERNAL": ServerFailureError,
}
_CODED_MESSAGE = re.compile(rf"({'|'.join(_ERROR_OF_CODE)}): (.*)", re.DOTALL)
_STOPPING = re.compile(r".*(?:Server is stopping|has no available versions)")
"""What Triton says to requests that come while it unloads its models."""
_REFUSED_BY_TRITON = re.compile(r"\[request id: [^\]]*\] |Request for unknown model")

_ERROR_OF_STATUS: dict[grpc.StatusCode, type[QuireClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: InvalidRequestError,
    grpc.StatusCode.UNIMPLEMENTED: InvalidRequestError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.DEADLINE_EXCEEDED: RequestTimeoutError,
}


def infer_request(model: str, prompt: Prompt, options: SamplingOptions, *, stream: bool) -> Any:
    """The `ModelInferRequest` for a prompt.

    Raises:
        InvalidRequestError: an option is unknown, or its value does not fit its type.
    """
    request = service_pb2.ModelInferRequest(model_name=model)
    if isinstance(prompt, str):
        _add(request, "text_input", "BYTES", 1, _packed_strings("text_input", [prompt]))
    else:
        ids = _packed("input_ids", "INT32", f"<{len(prompt)}i", prompt)
        _add(request, "input_ids", "INT32", len(prompt), ids)
    _add(request, "stream", "BOOL", 1, struct.pack("?", stream))
    given = {"exclude_input_in_output": True} | {k: v for k, v in options.items() if v is not None}
    for name, value in given.items():
        if name == "stop":
            strings = [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]
            _add(request, name, "BYTES", len(strings), _packed_strings(name, strings))
        elif name in _OPTION_TYPES:
            datatype, layout = _OPTION_TYPES[name]
            _add(request, name, datatype, 1, _packed(name, datatype, layout, [value]))
        else:
            raise InvalidRequestError(f"{name} is not an option of a request")
    return request


@dataclass(slots=True)
class ResponseReader:
    """Puts one request's responses together."""

    _deltas: list[Delta] = field(default_factory=list)
    result: GenerateResult | None = None

    def read(self, response: Any) -> Delta:
        """Read a `ModelStreamInferResponse`; the last one completes `result`.

        Raises:
            QuireClientError: the response is an error.
        """
        if response.error_message:
            raise error_of_message(response.error_message)
        infer_response = response.infer_response
        outputs = {
            output.name: raw
            for output, raw in zip(infer_response.outputs, infer_response.raw_output_contents, strict=True)
        }
        delta = Delta(_string(outputs["text_output"]), _integers(outputs["output_ids"]))
        self._deltas.append(delta)
        if "finish_reason" in outputs:
            self.result = GenerateResult(
                text="".join(delta.text for delta in self._deltas),
                token_ids=tuple(token for delta in self._deltas for token in delta.token_ids),
                finish_reason=_string(outputs["finish_reason"]),
                num_input_tokens=_integers(outputs["num_input_tokens"])[0],
                num_output_tokens=_integers(outputs["num_output_tokens"])[0],
            )
        return delta

    def finished(self) -> GenerateResult:
        """The result, once the stream has ended.

        Raises:
            ServerFailureError: it ended without a last response.
        """
        if self.result is None:
            raise ServerFailureError("the server closed the stream before the request's last response")
        return self.result


def model_info(model: Any, server: Any) -> ModelInfo:
    """From Triton's `ModelMetadataResponse` and `ServerMetadataResponse`."""

    def tensors(described: Iterable[Any]) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(t.name, t.datatype, tuple(t.shape)) for t in described)

    return ModelInfo(
        name=model.name,
        versions=tuple(model.versions),
        inputs=tensors(model.inputs),
        outputs=tensors(model.outputs),
        server_version=server.version,
    )


def error_of_message(message: str) -> QuireClientError:
    """The exception for an error within a stream.

    Triton drops the status code there, so Quire's components put its name before their sentence; what
    Triton refuses by itself, before a component sees it, is told by its wording.
    """
    if coded := _CODED_MESSAGE.fullmatch(message):
        return _ERROR_OF_CODE[coded[1]](coded[2])
    if _STOPPING.match(message):
        return UnavailableError(message)
    if _REFUSED_BY_TRITON.match(message):
        return InvalidRequestError(message)
    return ServerFailureError(message)


def error_of_rpc(error: grpc.RpcError) -> QuireClientError:
    """The exception for a call that failed as a whole."""
    details = error.details() or str(error.code())
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        details = f"the server cannot be reached; is it running at this address? ({details})"
    elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        details = "the request was not finished in the time that it was given"
    return _ERROR_OF_STATUS.get(error.code(), ServerFailureError)(details)


def _add(request: Any, name: str, datatype: str, size: int, raw: bytes) -> None:
    request.inputs.add(name=name, datatype=datatype, shape=[size])
    request.raw_input_contents.append(raw)


def _packed(name: str, datatype: str, layout: str, values: Sequence[Any]) -> bytes:
    try:
        return struct.pack(layout, *values)
    except (struct.error, OverflowError) as error:
        raise InvalidRequestError(f"{name} has a value that does not fit {datatype}: {error}") from None


def _packed_strings(name: str, strings: Iterable[str]) -> bytes:
    try:
        encoded = [string.encode() for string in strings]
    except UnicodeEncodeError as error:
        # A lone surrogate: Python puts it where bytes from a file or a terminal were not UTF-8.
        raise InvalidRequestError(
            f"{name} cannot be sent as UTF-8: its character {error.start} is half of a surrogate pair or "
            "stands for a byte that was not UTF-8"
        ) from None
    return b"".join(struct.pack("<I", len(string)) + string for string in encoded)


def _string(raw: bytes) -> str:
    """The one string of a BYTES tensor: 4 bytes of length, then UTF-8."""
    return raw[4:].decode()


def _integers(raw: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(raw, np.int32).tolist())
