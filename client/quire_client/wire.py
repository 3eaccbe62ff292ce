"""Between the client's data and Triton's gRPC messages; no connection is touched here.

Each request is a stream of its own (`ModelStreamInfer` with one request in it) on a shared connection:
its end is the request's end and cancelling it cancels the request, with no table of request ids between.
"""

from __future__ import annotations

import re
import reprlib
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

MAX_TIMEOUT_S = 10.0**9
"""About 30 years; gRPC takes much more for a time that is over."""

_OPTION_TYPES = {
    "max_tokens": "INT32",
    "temperature": "FP32",
    "top_k": "INT32",
    "top_p": "FP32",
    "min_p": "FP32",
    "seed": "UINT64",
    "exclude_input_in_output": "BOOL",
}
_LAYOUTS_AND_LIMITS = {
    "INT32": ("<i", f"an integer from {-(2**31)} to {2**31 - 1}"),
    "UINT64": ("<Q", f"an integer from 0 to {2**64 - 1}"),
    "FP32": ("<f", "a number from -3.4e38 to 3.4e38"),
    "BOOL": ("<?", "True or False"),
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

_ADDRESS = re.compile(r"(?:\[[^\s\[\]/]+\]|[^\s\[\]/:]+):(\d{1,5})")
_NOT_CONNECTED = re.compile(r"failed to connect|errors resolving|resolution failed|empty address list")
"""How gRPC says that there was no connection; its other words for UNAVAILABLE are about losing one."""

_ERROR_OF_STATUS: dict[grpc.StatusCode, type[QuireClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: InvalidRequestError,
    grpc.StatusCode.UNIMPLEMENTED: InvalidRequestError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.DEADLINE_EXCEEDED: RequestTimeoutError,
}


def checked_url(url: str) -> str:
    """`url`, if it is of the form that a client takes.

    Raises:
        InvalidRequestError: it is not. gRPC would take it for a name to look up, or add port 443.
    """
    match = _ADDRESS.fullmatch(url) if isinstance(url, str) else None
    if match is None or not 1 <= int(match[1]) <= 65535:
        raise InvalidRequestError(
            f"url is {url!r}; it must be host:port, such as localhost:8001 or [::1]:8001, without http://"
        )
    return url


def checked_timeout(timeout_s: float) -> float:
    """`timeout_s`, if it can be given to gRPC.

    Raises:
        InvalidRequestError: it cannot.
    """
    if not (isinstance(timeout_s, int | float | np.number) and 0 <= timeout_s <= MAX_TIMEOUT_S):
        raise InvalidRequestError(
            f"timeout_s is {timeout_s!r}; it must be a number of seconds from 0 to {MAX_TIMEOUT_S:.0f}"
        )
    return float(timeout_s)


def infer_request(model: str, prompt: Prompt, options: SamplingOptions, *, stream: bool) -> Any:
    """The `ModelInferRequest` for a prompt.

    Raises:
        InvalidRequestError: the prompt is neither text nor token ids, an option is unknown, or a value does
            not fit its type.
    """
    request = service_pb2.ModelInferRequest(model_name=model)
    if isinstance(prompt, str):
        _add(request, "text_input", "BYTES", 1, _packed_strings("text_input", [prompt]))
    else:
        ids = _token_ids(prompt)
        _add(request, "input_ids", "INT32", len(ids), _packed_ids(ids))
    _add(request, "stream", "BOOL", 1, struct.pack("?", stream))
    given = {"exclude_input_in_output": True} | {k: v for k, v in options.items() if v is not None}
    for name, value in given.items():
        if name == "stop":
            strings = _strings(name, value)
            _add(request, name, "BYTES", len(strings), _packed_strings(name, strings))
        elif name in _OPTION_TYPES:
            datatype = _OPTION_TYPES[name]
            _add(request, name, datatype, 1, _packed(name, datatype, value))
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


def error_of_rpc(error: grpc.RpcError, address: str) -> QuireClientError:
    """The exception for a call to `address` that failed as a whole."""
    details = error.details() or str(error.code())
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        if _NOT_CONNECTED.search(details):
            details = f"the server cannot be reached; is it running at {address}? ({details})"
        elif not _STOPPING.match(details):
            details = f"the connection to the server at {address} was lost during the request ({details})"
    elif error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        details = "the request was not finished in the time that it was given"
    return _ERROR_OF_STATUS.get(error.code(), ServerFailureError)(details)


def _add(request: Any, name: str, datatype: str, size: int, raw: bytes) -> None:
    request.inputs.add(name=name, datatype=datatype, shape=[size])
    request.raw_input_contents.append(raw)


def _token_ids(prompt: Any) -> Sequence[int]:
    ids = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
    if not isinstance(ids, Sequence) or isinstance(ids, bytes | bytearray | memoryview):
        raise InvalidRequestError(
            f"prompt is {reprlib.repr(prompt)}; it must be a string or a sequence of token ids"
        )
    return ids


def _strings(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable) or isinstance(value, bytes | bytearray | memoryview):
        raise InvalidRequestError(
            f"{name} is {reprlib.repr(value)}; it must be a string or a sequence of strings"
        )
    strings = list(value)
    for index, string in enumerate(strings):
        if not isinstance(string, str):
            raise InvalidRequestError(f"{name}[{index}] is {reprlib.repr(string)}; it must be a string")
    return strings


def _packed_ids(ids: Sequence[int]) -> bytes:
    try:
        return struct.pack(f"<{len(ids)}i", *ids)
    except (struct.error, TypeError):
        # One by one, the id that does not fit is named.
        return b"".join(_packed(f"input_ids[{index}]", "INT32", id_) for index, id_ in enumerate(ids))


def _packed(name: str, datatype: str, value: Any) -> bytes:
    layout, limits = _LAYOUTS_AND_LIMITS[datatype]
    try:
        if isinstance(value, bool | np.bool_) != (datatype == "BOOL"):
            raise TypeError
        return struct.pack(layout, value)
    except (struct.error, OverflowError, TypeError):
        raise InvalidRequestError(f"{name} is {reprlib.repr(value)}; it must be {limits}") from None


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
