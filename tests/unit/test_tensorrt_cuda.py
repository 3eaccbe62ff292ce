"""CUDA as a `Device`; needs a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from quire.execution.tensorrt.cuda import CudaDevice
from quire.execution.tensorrt.device import ALIGNMENT, DeviceError

runtime = pytest.importorskip("cuda.bindings.runtime")
if runtime.cudaGetDeviceCount()[0] != runtime.cudaError_t.cudaSuccess:
    pytest.skip("there is no GPU", allow_module_level=True)


@pytest.fixture
def device() -> Iterator[CudaDevice]:
    device = CudaDevice()
    yield device
    device.close()


def test_bytes_go_to_the_gpu_and_come_back(device: CudaDevice) -> None:
    address, source, target = device.allocate(1000), device.pinned(1000), device.pinned(1000)
    assert address % ALIGNMENT == 0
    assert source.ctypes.data % ALIGNMENT == 0
    assert not target.any()
    source[:] = np.arange(1000) % 251
    device.copy_in(address, source)
    device.copy_out(target, address)
    device.synchronize()
    assert target.tolist() == source.tolist()
    device.free(address)
    device.free_pinned(source)
    device.free_pinned(target)


def test_rows_are_set_apart(device: CudaDevice) -> None:
    address, source, target = device.allocate(64), device.pinned(24), device.pinned(64)
    matrix = source.view(np.int32).reshape(3, 2)
    matrix[:] = [[1, 2], [3, 4], [5, 6]]
    device.clear(address, 64)
    device.copy_rows_in(address, 16, matrix)
    device.copy_out(target, address)
    device.synchronize()
    assert target.view(np.int32).reshape(4, 4).tolist() == [
        [1, 2, 0, 0],
        [3, 4, 0, 0],
        [5, 6, 0, 0],
        [0, 0, 0, 0],
    ]


def test_a_graph_does_what_was_captured_when_it_is_launched(device: CudaDevice) -> None:
    address, source, target = device.allocate(256), device.pinned(256), device.pinned(256)
    source[:] = 7
    graph = device.capture(lambda: device.clear(address, 100))
    done = device.event()
    for _ in range(2):
        device.copy_in(address, source)
        device.launch(graph)
        device.copy_out(target, address)
        device.record(done)
        deadline = time.monotonic() + 30
        while not device.is_done(done):
            assert time.monotonic() < deadline
        assert target.tolist() == [0] * 100 + [7] * 156
    device.free_graph(graph)


def test_a_capture_that_fails_leaves_the_stream_usable(device: CudaDevice) -> None:
    def fail() -> None:
        raise DeviceError("on purpose")

    with pytest.raises(DeviceError, match="on purpose"):
        device.capture(fail)
    device.synchronize()


def test_memory_that_is_allocated_is_not_free(device: CudaDevice) -> None:
    before = device.memory()
    address = device.allocate(1 << 30)
    after = device.memory()
    assert after.total == before.total
    assert before.free - after.free >= 1 << 29
    device.free(address)


def test_more_memory_than_there_is_is_an_error_with_cudas_name(device: CudaDevice) -> None:
    with pytest.raises(DeviceError, match="cudaMalloc failed with cudaErrorMemoryAllocation"):
        device.allocate(2 * device.memory().total)
    device.synchronize()


def test_the_gpu_has_a_name_and_an_architecture(device: CudaDevice) -> None:
    assert device.properties.name.isprintable()
    assert device.properties.name
    assert device.properties.architecture >= 70
