"""Shared memory for a plan's kernels beyond the 48 KiB that the driver gives without being asked.

A GPU has several times as much, and a matrix product is fast only with most of it, but a kernel may use it
only after its function's limit was raised. TensorRT launches the kernels that a plan embeds without doing
that, and hands their functions to nobody. So CUPTI, the profiling interface of CUDA, is asked to show every
launch before it happens, and the limit is raised there. It stays raised, so a plan's kernels have to be
launched once with this in place, and run without it from then on.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quire.errors import StartupError
from quire.execution.tensorrt.library import DRIVER_LIBRARY

DEFAULT_SHARED_BYTES = 48 * 1024
"""What a program may ask for on every GPU without more ado."""

CUPTI_LIBRARIES = ("libcupti.so.13", "/usr/local/cuda/extras/CUPTI/lib64/libcupti.so.13")
"""Where a system has it, if the package does not."""

DRIVER_API = 1
CU_LAUNCH_KERNEL = (307, 442)
CU_LAUNCH_KERNEL_EX = (652, 653)
"""CUPTI's numbers of the driver's launches; the second of each is for per-thread default streams."""
ENTER = 0
MAX_DYNAMIC_SHARED_SIZE = 8
"""Number of a function's attribute in CUDA's driver API."""
MULTIPLE_SUBSCRIBERS = 39
"""CUPTI's error where a profiler is at work in this process."""


class CallbackData(ctypes.Structure):
    """The part of CUPTI's CUpti_CallbackData that is looked at."""

    _fields_ = (
        ("site", ctypes.c_int),
        ("function_name", ctypes.c_char_p),
        ("parameters", ctypes.c_void_p),
    )


class Extent(ctypes.Structure):
    """How the driver's launches say how much they launch."""

    _fields_ = (
        ("grid", 3 * ctypes.c_uint),
        ("block", 3 * ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
    )


class LaunchParameters(ctypes.Structure):
    """Of cuLaunchKernel, as far as they are looked at."""

    _fields_ = (("function", ctypes.c_void_p), ("extent", Extent))


class LaunchExParameters(ctypes.Structure):
    """Of cuLaunchKernelEx, whose configuration begins with an `Extent`."""

    _fields_ = (("extent", ctypes.POINTER(Extent)), ("function", ctypes.c_void_p))


Callback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.POINTER(CallbackData)
)


@contextlib.contextmanager
def allow_shared_memory(most_bytes: int, load: Callable[[str], Any] = ctypes.CDLL) -> Iterator[None]:
    """Kernels that this process launches meanwhile get the shared memory they ask for, then and later.

    Args:
        most_bytes: that any of them asks for; where that is no more than every program has, nothing is done.
        load: opens a shared library or raises OSError.

    Raises:
        StartupError: CUPTI is not installed, or a profiler uses it in this process.
    """
    if most_bytes <= DEFAULT_SHARED_BYTES:
        yield
        return
    cupti = load_cupti(load)
    try:
        raiser = LimitRaiser(load(DRIVER_LIBRARY))
    except OSError as error:
        raise StartupError(f"the GPU's driver cannot be used: {error}") from None
    subscriber = ctypes.c_void_p()
    status = cupti.cuptiSubscribe(ctypes.byref(subscriber), raiser.callback, None)
    _check(cupti, "cuptiSubscribe", status)
    try:
        for number in (*CU_LAUNCH_KERNEL, *CU_LAUNCH_KERNEL_EX):
            status = cupti.cuptiEnableCallback(1, subscriber, DRIVER_API, number)
            _check(cupti, "cuptiEnableCallback", status)
        yield
    finally:
        cupti.cuptiUnsubscribe(subscriber)


class LimitRaiser:
    """Raises the limit of each function that is about to be launched with more shared memory than it has.

    Args:
        driver: CUDA's driver API.
    """

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.callback = Callback(self._before_launch)
        """What CUPTI calls; has to be kept as long as it may."""

    def _before_launch(self, _user: Any, _domain: int, number: int, data: Any) -> None:
        call = data.contents
        if call.site != ENTER:
            return
        if number in CU_LAUNCH_KERNEL:
            plain = ctypes.cast(call.parameters, ctypes.POINTER(LaunchParameters)).contents
            function, shared_bytes = plain.function, plain.extent.shared_bytes
        else:
            extended = ctypes.cast(call.parameters, ctypes.POINTER(LaunchExParameters)).contents
            function, shared_bytes = extended.function, extended.extent.contents.shared_bytes
        # Whether it was raised before is not remembered: a function may lie where one was that is gone.
        if shared_bytes > DEFAULT_SHARED_BYTES:
            self._raise_limit(ctypes.c_void_p(function), ctypes.c_int(shared_bytes))

    def _raise_limit(self, function: ctypes.c_void_p, shared_bytes: ctypes.c_int) -> None:
        """A failure is not looked at: the launch that follows fails then, and says why."""
        if self._driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE, shared_bytes) == 0:
            return
        # A kernel of a library, which belongs to no context.
        gpu = ctypes.c_int()
        self._driver.cuCtxGetDevice(ctypes.byref(gpu))
        self._driver.cuKernelSetAttribute(MAX_DYNAMIC_SHARED_SIZE, shared_bytes, function, gpu)


def load_cupti(load: Callable[[str], Any]) -> Any:
    """CUPTI's library: the package nvidia-cuda-cupti's, or one that the system has.

    Raises:
        StartupError: there is none.
    """
    errors = []
    for path in (*_packaged(), *CUPTI_LIBRARIES):
        try:
            return load(str(path))
        except OSError as error:
            errors.append(str(error))
    raise StartupError(
        f"this engine needs CUPTI of CUDA 13 ({errors[0]}); install it with `pip install nvidia-cuda-cupti`"
    )


def _packaged() -> list[Path]:
    namespace = importlib.util.find_spec("nvidia")
    folders = (namespace.submodule_search_locations if namespace else None) or ()
    return [path for folder in folders for path in Path(folder).glob("cu13/lib/libcupti.so.13")]


def _check(cupti: Any, name: str, status: int) -> None:
    if status == 0:
        return
    text = ctypes.c_char_p()
    cupti.cuptiGetResultString(status, ctypes.byref(text))
    reason = (text.value or b"").decode() or str(status)
    more = "; a profiler in this process is in the way" if status == MULTIPLE_SUBSCRIBERS else ""
    raise StartupError(f"CUPTI cannot be used: {name} failed with {reason}{more}")
