"""Between Triton's requests and responses and plain numpy: the thin layer that every component needs."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]
from numpy.typing import NDArray

from quire.errors import AccessDeniedError, QuireError
from quire.interface import LLM

Arrays = dict[str, NDArray[Any]]


def input_arrays(request: Any) -> Arrays:
    """A request's tensors by name; the arrays are the caller's to keep."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def check_access(arrays: Arrays, access_key: bytes) -> None:
    """Let only Quire's own processes pass.

    Raises:
        AccessDeniedError: the tensor `access_key` is not the key of this server start.
    """
    if not hmac.compare_digest(arrays["access_key"].tobytes(), access_key):
        raise AccessDeniedError(f"this model serves Quire's own processes only; send requests to model {LLM}")


def response(arrays: Mapping[str, NDArray[Any]]) -> Any:
    """A response of these tensors; Triton copies them before the next request is executed."""
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in arrays.items()])


def error_response(error: QuireError) -> Any:
    """The response that ends a request with an error, with the status code of its class.

    Triton drops the code on the way into a gRPC stream, so its name leads the message: `quire_client` reads
    it there.
    """
    code = getattr(pb_utils.TritonError, error.code)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{error.code}: {error}", code))


def string_array(text: str) -> NDArray[np.object_]:
    """A tensor of one string."""
    return np.array([text.encode()], dtype=np.object_)
