"""The async client: `Client` word for word, with `await`. Its docstrings are there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from quire_client.client import CONTROL_TIMEOUT_S, DEFAULT_MODEL, DEFAULT_TIMEOUT_S, DEFAULT_URL
from quire_client.errors import QuireClientError, RequestCancelledError
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


class AsyncClient:
    """A client of one server for asyncio; see `Client`. Cancelling a task cancels its request."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        model: str = DEFAULT_MODEL,
        channel: grpc.aio.Channel | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._model = model
        self._own_channel = None
        self._address = "the given channel's address"
        if channel is None:
            self._address = checked_url(url)
            self._own_channel = grpc.aio.insecure_channel(url, CHANNEL_OPTIONS)
        self._service = service_pb2_grpc.GRPCInferenceServiceStub(channel or self._own_channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """See `Client.close`."""
        if self._own_channel is not None:
            await self._own_channel.close()

    async def generate(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[SamplingOptions]
    ) -> GenerateResult:
        """See `Client.generate`."""
        return await self._start(prompt, options, timeout_s, stream=False).result()

    def stream(
        self, prompt: Prompt, *, timeout_s: float | None = None, **options: Unpack[SamplingOptions]
    ) -> AsyncTokenStream:
        """See `Client.stream`; iterate with `async for`."""
        return self._start(prompt, options, timeout_s, stream=True)

    async def is_live(self) -> bool:
        """See `Client.is_live`."""
        request = service_pb2.ServerLiveRequest()
        answer = await self._healthy(self._service.ServerLive(request, timeout=CONTROL_TIMEOUT_S))
        return answer is not None and bool(answer.live)

    async def is_ready(self) -> bool:
        """See `Client.is_ready`."""
        request = service_pb2.ServerReadyRequest()
        answer = await self._healthy(self._service.ServerReady(request, timeout=CONTROL_TIMEOUT_S))
        return answer is not None and bool(answer.ready)

    async def model_info(self) -> ModelInfo:
        """See `Client.model_info`."""
        try:
            return model_info(
                await self._service.ModelMetadata(
                    service_pb2.ModelMetadataRequest(name=self._model), timeout=CONTROL_TIMEOUT_S
                ),
                await self._service.ServerMetadata(
                    service_pb2.ServerMetadataRequest(), timeout=CONTROL_TIMEOUT_S
                ),
            )
        except grpc.RpcError as error:
            raise error_of_rpc(error, self._address) from error

    def _start(
        self, prompt: Prompt, options: SamplingOptions, timeout_s: float | None, *, stream: bool
    ) -> AsyncTokenStream:
        request = infer_request(self._model, prompt, options, stream=stream)
        limit_s = checked_timeout(self._timeout_s if timeout_s is None else timeout_s)
        call = self._service.ModelStreamInfer(iter([request]), timeout=limit_s)
        return AsyncTokenStream(call, self._address)

    @staticmethod
    async def _healthy(call: Awaitable[Any]) -> Any:
        try:
            return await call
        except grpc.RpcError:
            return None


class AsyncTokenStream:
    """One request under way: an async iterator over its deltas; see `TokenStream`."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._responses = aiter(call)
        self._reader = ResponseReader()
        self._cancelled = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        try:
            return self._reader.read(await anext(self._responses))
        except StopAsyncIteration:
            self._reader.finished()
            raise
        except grpc.RpcError as error:
            raise error_of_rpc(error, self._address) from error
        except asyncio.CancelledError:
            # grpc reports its own cancellation the way asyncio reports that of the waiting task.
            if self._cancelled:
                raise RequestCancelledError("the request was cancelled") from None
            self._call.cancel()
            raise
        except QuireClientError:
            self._call.cancel()
            raise

    def __del__(self) -> None:
        self._call.cancel()

    def cancel(self) -> None:
        """See `TokenStream.cancel`."""
        self._cancelled = True
        self._call.cancel()

    async def aclose(self) -> None:
        """The same as `cancel`, for `contextlib.aclosing`."""
        self.cancel()

    async def result(self) -> GenerateResult:
        """See `TokenStream.result`."""
        async for _ in self:
            pass
        return self._reader.finished()
