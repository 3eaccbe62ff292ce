"""The sync client; `AsyncClient` is its twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from quire_client.errors import QuireClientError
from quire_client.types import Delta, GenerateResult, ModelInfo, Prompt, SamplingOptions
from quire_client.wire import (
    CHANNEL_OPTIONS,
    ResponseReader,
    checked_timeout,
    checked_url,
    error_of_rpc,
    infer_request,
    model_info,
)

DEFAULT_URL = "localhost:8001"
DEFAULT_MODEL = "llm"
DEFAULT_TIMEOUT_S = 300.0
CONTROL_TIMEOUT_S = 10.0
"""For calls that generate nothing."""


class Client:
    """A client of one server. May be shared by any number of threads; close it, or use it in `with`.

    Args:
        url: the server's gRPC address, `host:port`; an IPv6 address goes in brackets.
        timeout_s: seconds that a request may take from its sending to its last token; a method's own
            `timeout_s` overrides it.
        model: name of the model.
        channel: a connection to use instead of one to `url`, with other credentials or options; the
            caller closes it.

    Raises:
        InvalidRequestError: `url` is not of this form.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        model: str = DEFAULT_MODEL,
        channel: grpc.Channel | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._model = model
        self._own_channel = None
        self._address = "the given channel's address"
        if channel is None:
            self._address = checked_url(url)
            self._own_channel = grpc.insecure_channel(url, CHANNEL_OPTIONS)
        self._service = service_pb2_grpc.GRPCInferenceServiceStub(channel or self._own_channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; requests under way are cancelled."""
        if self._own_channel is not None:
            self._own_channel.close()

    def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[SamplingOptions]
    ) -> GenerateResult:
        """Generate from `prompt` and return when it is finished. For the options see `SamplingOptions`.

        Raises:
            QuireClientError: see `quire_client.errors` for what exactly.
        """
        return self._start(prompt, options, timeout_s, stream=False).result()

    def stream(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[SamplingOptions]
    ) -> TokenStream:
        """Start to generate from `prompt`; iterate over what is returned for the deltas as they come.

        Raises:
            InvalidRequestError: the prompt, an option or the timeout cannot be sent. Other errors come out
                of the iteration.
        """
        return self._start(prompt, options, timeout_s, stream=True)

    def is_live(self) -> bool:
        """Whether a server answers."""
        request = service_pb2.ServerLiveRequest()
        return self._healthy(lambda: self._service.ServerLive(request, timeout=CONTROL_TIMEOUT_S).live)

    def is_ready(self) -> bool:
        """Whether the server has loaded its models."""
        request = service_pb2.ServerReadyRequest()
        return self._healthy(lambda: self._service.ServerReady(request, timeout=CONTROL_TIMEOUT_S).ready)

    def model_info(self) -> ModelInfo:
        """The model's name, versions and tensors.

        Raises:
            QuireClientError: no server answers or it has no such model.
        """
        try:
            return model_info(
                self._service.ModelMetadata(
                    service_pb2.ModelMetadataRequest(name=self._model), timeout=CONTROL_TIMEOUT_S
                ),
                self._service.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=CONTROL_TIMEOUT_S),
            )
        except grpc.RpcError as error:
            raise error_of_rpc(error, self._address) from error

    def _start(
        self, prompt: Prompt, options: SamplingOptions, timeout_s: float | None, *, stream: bool
    ) -> TokenStream:
        request = infer_request(self._model, prompt, options, stream=stream)
        limit_s = checked_timeout(self._timeout_s if timeout_s is None else timeout_s)
        call = self._service.ModelStreamInfer(iter([request]), timeout=limit_s)
        return TokenStream(call, self._address)

    @staticmethod
    def _healthy(ask: Callable[[], Any]) -> bool:
        try:
            return bool(ask())
        except grpc.RpcError:
            return False


class TokenStream:
    """One request under way: an iterator over its deltas.

    Leaving a `with` block, `close` and `cancel` end the request at the server if it isn't finished, and so
    does forgetting the stream. `cancel` may be called from another thread.
    """

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._reader = ResponseReader()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        try:
            return self._reader.read(next(self._call))
        except StopIteration:
            self._reader.finished()
            raise
        except grpc.RpcError as error:
            raise error_of_rpc(error, self._address) from error
        except QuireClientError:
            self._call.cancel()
            raise

    def __del__(self) -> None:
        self._call.cancel()

    def cancel(self) -> None:
        """End the request; whoever iterates gets a `RequestCancelledError`."""
        self._call.cancel()

    def close(self) -> None:
        """The same as `cancel`, for `contextlib.closing`; does nothing to a finished request."""
        self._call.cancel()

    def result(self) -> GenerateResult:
        """Read to the end and return the whole.

        Raises:
            QuireClientError: the request ended with an error.
        """
        for _ in self:
            pass
        return self._reader.finished()
