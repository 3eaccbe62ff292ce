"""What running a plan needs of a GPU: memory, one stream, events and graphs.

A `Device` is one GPU with one stream. Copies and launches are queued on that stream and run one after the
other, in the order of the calls; host memory in a queued copy must stay as it is until the copy has run.
Addresses are integers, as TensorRT takes them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 256
"""Bytes that every tensor's address is a multiple of."""

Event = Any
Graph = Any
"""Handles, whose content is the device's own business."""


class DeviceError(Exception):
    """A call to the GPU failed. After most such errors no later call of this process succeeds."""


@dataclass(frozen=True, slots=True)
class DeviceProperties:
    """Which GPU it is."""

    name: str
    architecture: int
    """Compute capability, 90 for 9.0."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Memory of a GPU in bytes, over all processes."""

    free: int
    total: int


class Device(Protocol):
    """One GPU and one stream on it. Every method may raise `DeviceError`."""

    properties: DeviceProperties
    stream: int
    """Handle of the stream, for whoever queues kernels on it."""

    def memory(self) -> DeviceMemory:
        """What there is and what is free now."""
        ...

    def allocate(self, num_bytes: int) -> int:
        """Memory of the GPU, aligned to `ALIGNMENT`, its contents undefined."""
        ...

    def free(self, address: int) -> None:
        """Give back what `allocate` returned. Waits for work that is queued."""
        ...

    def pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        """Host memory that the GPU can copy from and to, zeroed, aligned to `ALIGNMENT`."""
        ...

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        """Give back what `pinned` returned."""
        ...

    def copy_in(self, address: int, source: NDArray[Any]) -> None:
        """Queue a copy of a contiguous array in pinned memory to the GPU."""
        ...

    def copy_rows_in(self, address: int, pitch: int, source: NDArray[Any]) -> None:
        """Queue a copy of a contiguous matrix in pinned memory to rows that lie `pitch` bytes apart."""
        ...

    def copy_out(self, target: NDArray[Any], address: int) -> None:
        """Queue a copy from the GPU to a contiguous array in pinned memory."""
        ...

    def clear(self, address: int, num_bytes: int) -> None:
        """Queue writing zeros."""
        ...

    def event(self) -> Event:
        """An event that can be recorded."""
        ...

    def record(self, event: Event) -> None:
        """Queue the event: it is done once everything queued before is."""
        ...

    def is_done(self, event: Event) -> bool:
        """Whether the work before the last `record` has ended; does not wait."""
        ...

    def synchronize(self) -> None:
        """Wait for everything that is queued."""
        ...

    def allow_shared_memory(self, most_bytes: int) -> AbstractContextManager[None]:
        """Kernels queued meanwhile get the shared memory that they ask for, at most so much, then and later.

        Raises:
            StartupError: that is not possible in this process.
        """
        ...

    def capture(self, enqueue: Callable[[], None]) -> Graph:
        """A graph of what `enqueue` queues, which is not run by that."""
        ...

    def launch(self, graph: Graph) -> None:
        """Queue a graph."""
        ...

    def free_graph(self, graph: Graph) -> None:
        """Give a graph back."""
        ...

    def close(self) -> None:
        """Give the stream and the events back; memory and graphs have been."""
        ...
