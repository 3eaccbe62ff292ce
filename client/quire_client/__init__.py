"""A typed client for Quire, sync and async, on tritonclient.

from quire_client import Client

with Client("localhost:8001") as client:
    for delta in client.stream("Once upon a time", max_tokens=64, temperature=0.7):
        print(delta.text, end="", flush=True)
"""

from quire_client.async_client import AsyncClient, AsyncTokenStream
from quire_client.client import Client, TokenStream
from quire_client.errors import (
    InvalidRequestError,
    QuireClientError,
    RequestCancelledError,
    RequestError,
    RequestTimeoutError,
    ServerFailureError,
    UnavailableError,
)
from quire_client.types import Delta, GenerateResult, ModelInfo, Prompt, SamplingOptions, TensorInfo

__all__ = [
    "AsyncClient",
    "AsyncTokenStream",
    "Client",
    "Delta",
    "GenerateResult",
    "InvalidRequestError",
    "ModelInfo",
    "Prompt",
    "QuireClientError",
    "RequestCancelledError",
    "RequestError",
    "RequestTimeoutError",
    "SamplingOptions",
    "ServerFailureError",
    "TensorInfo",
    "TokenStream",
    "UnavailableError",
]
