"""Shared memory for a plan's kernels beyond the 48 KiB that the driver gives without being asked.

A GPU has several times as much, and a matrix product is fast only with most of it, but a kernel may use it
only after its function's limit was raised. TensorRT launches the kernels that a plan embeds without doing
that. So the limit is raised by someone who sees the launches (`launches.py`). It stays raised, so a plan's
kernels have to be launched once with this in place, and run without it from then on.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

from quire.errors import StartupError
from quire.execution.tensorrt.launches import KernelLaunch, watch_launches
from quire.execution.tensorrt.library import DRIVER_LIBRARY

DEFAULT_SHARED_BYTES = 48 * 1024
"""What a program may ask for on every GPU without more ado."""
MAX_DYNAMIC_SHARED_SIZE = 8
"""Number of a function's attribute in CUDA's driver API."""


@contextlib.contextmanager
def allow_shared_memory(
    most_bytes: int,
    *watchers: Callable[[KernelLaunch], None],
    load: Callable[[str], Any] = ctypes.CDLL,
) -> Iterator[None]:
    """Kernels that this process launches meanwhile get the shared memory they ask for, then and later.

    Args:
        most_bytes: that any of them asks for; where that is no more than every program has, and there are no
            watchers, nothing is done.
        watchers: who else wants to see the launches; only one at a time may use CUPTI.
        load: opens a shared library or raises OSError.

    Raises:
        StartupError: CUPTI is not installed, or a profiler uses it in this process.
    """
    if most_bytes <= DEFAULT_SHARED_BYTES and not watchers:
        yield
        return
    try:
        raiser = LimitRaiser(load(DRIVER_LIBRARY))
    except OSError as error:
        raise StartupError(f"the GPU's driver cannot be used: {error}") from None
    with watch_launches(raiser, *watchers, load=load):
        yield


class LimitRaiser:
    """Raises the limit of each function that is about to be launched with more shared memory than it has.

    Args:
        driver: CUDA's driver API.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver

    def __call__(self, launch: KernelLaunch) -> None:
        """Before a launch.

        A failure is not looked at: the launch fails then, and says why. Whether a limit was raised before is
        not remembered: a function may lie where one was that is gone.
        """
        if launch.shared_bytes <= DEFAULT_SHARED_BYTES:
            return
        function, shared_bytes = ctypes.c_void_p(launch.function), ctypes.c_int(launch.shared_bytes)
        if self._driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE, shared_bytes) == 0:
            return
        # A kernel of a library, which belongs to no context.
        gpu = ctypes.c_int()
        self._driver.cuCtxGetDevice(ctypes.byref(gpu))
        self._driver.cuKernelSetAttribute(MAX_DYNAMIC_SHARED_SIZE, shared_bytes, function, gpu)
