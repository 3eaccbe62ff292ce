"""The first visible NVIDIA GPU as a `Device`, by the package cuda-bindings."""

# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.errors import StartupError
from quire.execution.tensorrt.device import DeviceError, DeviceMemory, DeviceProperties, Event, Graph
from quire.execution.tensorrt.shared_memory import allow_shared_memory


class CudaDevice:
    """`Device` on CUDA device 0.

    Raises:
        StartupError: there is no GPU that can be used, or cuda-bindings is not installed.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise StartupError(
                f"running a TensorRT engine needs the package cuda-bindings ({error}); "
                "install it with `pip install cuda-bindings`"
            ) from None
        self._cuda: Any = runtime
        self._events: list[Event] = []
        try:
            self._call("cudaSetDevice", 0)
            found = self._call("cudaGetDeviceProperties", 0)
            self._stream = self._call("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
        except DeviceError as error:
            raise StartupError(f"the GPU cannot be used: {error}") from None
        self.stream = int(self._stream)
        self.properties = DeviceProperties(
            found.name.split(b"\0")[0].decode(), 10 * found.major + found.minor
        )
        kinds = runtime.cudaMemcpyKind
        self._in, self._out = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost

    def memory(self) -> DeviceMemory:
        """What there is and what is free now."""
        free, total = self._call("cudaMemGetInfo")
        return DeviceMemory(free, total)

    def allocate(self, num_bytes: int) -> int:
        """Memory of the GPU; cudaMalloc aligns it to 256 bytes."""
        return int(self._call("cudaMalloc", num_bytes))

    def free(self, address: int) -> None:
        """Give it back."""
        self._call("cudaFree", address)

    def pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        """Page-locked host memory."""
        address = self._call("cudaHostAlloc", num_bytes, self._cuda.cudaHostAllocDefault)
        memory: NDArray[np.uint8] = np.ctypeslib.as_array(
            (ctypes.c_uint8 * num_bytes).from_address(int(address))
        )
        memory[:] = 0
        return memory

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        """Give it back."""
        self._call("cudaFreeHost", memory.ctypes.data)

    def copy_in(self, address: int, source: NDArray[Any]) -> None:
        """Queue a copy to the GPU."""
        self._call("cudaMemcpyAsync", address, source.ctypes.data, source.nbytes, self._in, self._stream)

    def copy_rows_in(self, address: int, pitch: int, source: NDArray[Any]) -> None:
        """Queue a copy to rows that lie apart."""
        rows, row_bytes = len(source), source.nbytes // len(source)
        self._call(
            "cudaMemcpy2DAsync",
            address,
            pitch,
            source.ctypes.data,
            row_bytes,
            row_bytes,
            rows,
            self._in,
            self._stream,
        )

    def copy_out(self, target: NDArray[Any], address: int) -> None:
        """Queue a copy from the GPU."""
        self._call("cudaMemcpyAsync", target.ctypes.data, address, target.nbytes, self._out, self._stream)

    def clear(self, address: int, num_bytes: int) -> None:
        """Queue writing zeros."""
        self._call("cudaMemsetAsync", address, 0, num_bytes, self._stream)

    def event(self) -> Event:
        """An event without a time."""
        event = self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)
        self._events.append(event)
        return event

    def record(self, event: Event) -> None:
        """Queue the event."""
        self._call("cudaEventRecord", event, self._stream)

    def is_done(self, event: Event) -> bool:
        """Whether what was queued before it has ended."""
        (status,) = self._cuda.cudaEventQuery(event)
        if status == self._cuda.cudaError_t.cudaErrorNotReady:
            return False
        self._check("cudaEventQuery", status)
        return True

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._call("cudaStreamSynchronize", self._stream)

    def allow_shared_memory(self, most_bytes: int) -> AbstractContextManager[None]:
        """More than 48 KiB needs CUPTI, and no profiler beside it."""
        return allow_shared_memory(most_bytes)

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """A graph of what `enqueue` queues, uploaded to the GPU."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        try:
            enqueue()
        except BaseException:
            # The stream has to leave the mode; what came of it is of no interest.
            self._cuda.cudaStreamEndCapture(self._stream)
            raise
        recorded = self._call("cudaStreamEndCapture", self._stream)
        try:
            graph = self._call("cudaGraphInstantiate", recorded, 0)
        finally:
            self._call("cudaGraphDestroy", recorded)
        self._call("cudaGraphUpload", graph, self._stream)
        return graph

    def launch(self, graph: Graph) -> None:
        """Queue a graph."""
        self._call("cudaGraphLaunch", graph, self._stream)

    def free_graph(self, graph: Graph) -> None:
        """Give it back."""
        self._call("cudaGraphExecDestroy", graph)

    def close(self) -> None:
        """Give the stream and the events back."""
        for event in self._events:
            self._call("cudaEventDestroy", event)
        self._events.clear()
        self._call("cudaStreamDestroy", self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        """What a function of the CUDA runtime returns besides its status: nothing, one value or a tuple.

        Raises:
            DeviceError: naming the function and the error.
        """
        status, *values = getattr(self._cuda, name)(*arguments)
        self._check(name, status)
        return values[0] if len(values) == 1 else tuple(values)

    def _check(self, name: str, status: Any) -> None:
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise DeviceError(f"{name} failed with {status.name}")
