"""A cold L2 cache while TensorRT times tactics.

TensorRT runs a tactic several times over the same tensors. A weight that fits the L2 cache is read from there
from the second time on, where a step reads every weight once, from memory, and so what TensorRT finds fastest
need not be. Memory of twice the cache's size that is written before each launch leaves nothing of a weight.
The time this takes is in TensorRT's figure, and the same for all tactics.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from quire.execution.tensorrt.launches import KernelLaunch


class ColdCache:
    """Writes the cache full before a launch, on its stream; see `quire.execution.tensorrt.launches`.

    Args:
        driver: CUDA's driver API.
        cache_bytes: the cache's size.
        device: where memory is taken, which has to be kept as long as launches are watched.
    """

    def __init__(self, driver: Any, cache_bytes: int, device: str = "cuda") -> None:
        self._driver = driver
        self._memory = torch.empty(2 * cache_bytes // 4, dtype=torch.int32, device=device)

    def __call__(self, launch: KernelLaunch) -> None:
        """Before a launch. A failure is not looked at: the cache is warm then."""
        self._driver.cuMemsetD32Async(
            ctypes.c_uint64(self._memory.data_ptr()),
            ctypes.c_uint(0),
            ctypes.c_size_t(self._memory.numel()),
            ctypes.c_void_p(launch.stream),
        )
