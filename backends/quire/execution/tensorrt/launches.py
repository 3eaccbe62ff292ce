"""Sees every kernel that this process launches, just before it happens.

TensorRT launches the kernels that a plan embeds and hands their functions to nobody. CUPTI, the profiling
interface of CUDA, shows each launch to whoever asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import StartupError

CUPTI_LIBRARIES = ("libcupti.so.13", "/usr/local/cuda/extras/CUPTI/lib64/libcupti.so.13")
"""Where a system has it, if the package does not."""

DRIVER_API = 1
CU_LAUNCH_KERNEL = (307, 442)
CU_LAUNCH_KERNEL_EX = (652, 653)
"""CUPTI's numbers of the driver's launches; the second of each is for per-thread default streams."""
ENTER = 0
MULTIPLE_SUBSCRIBERS = 39
"""CUPTI's error where a profiler is at work in this process."""


@dataclass(frozen=True)
class KernelLaunch:
    """A launch that is about to happen.

    Attributes:
        function: CUDA's handle of the kernel.
        shared_bytes: dynamic shared memory for a program.
        stream: CUDA's handle of the stream; None is the default one.
    """

    function: int
    shared_bytes: int
    stream: int | None


class CallbackData(ctypes.Structure):
    """The part of CUPTI's CUpti_CallbackData that is looked at."""

    _fields_ = (
        ("site", ctypes.c_int),
        ("function_name", ctypes.c_char_p),
        ("parameters", ctypes.c_void_p),
    )


class Configuration(ctypes.Structure):
    """How the driver's launches say how much they launch, and where."""

    _fields_ = (
        ("grid", 3 * ctypes.c_uint),
        ("block", 3 * ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
    )


class LaunchParameters(ctypes.Structure):
    """Of cuLaunchKernel, as far as they are looked at."""

    _fields_ = (("function", ctypes.c_void_p), ("configuration", Configuration))


class LaunchExParameters(ctypes.Structure):
    """Of cuLaunchKernelEx."""

    _fields_ = (("configuration", ctypes.POINTER(Configuration)), ("function", ctypes.c_void_p))


Callback = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.POINTER(CallbackData)
)


@contextlib.contextmanager
def watch_launches(
    *watchers: Callable[[KernelLaunch], None], load: Callable[[str], Any] = ctypes.CDLL
) -> Iterator[None]:
    """Every watcher is called before each launch of this process meanwhile, in the thread that launches.

    Args:
        watchers: may use CUDA's driver API.
        load: opens a shared library or raises OSError.

    Raises:
        StartupError: CUPTI is not installed, or a profiler uses it in this process.
    """
    cupti = load_cupti(load)

    def before(_user: Any, _domain: int, number: int, data: Any) -> None:
        call = data.contents
        if call.site == ENTER:
            launch = _launch(number, call.parameters)
            for watcher in watchers:
                watcher(launch)

    callback = Callback(before)
    subscriber = ctypes.c_void_p()
    status = cupti.cuptiSubscribe(ctypes.byref(subscriber), callback, None)
    _check(cupti, "cuptiSubscribe", status)
    try:
        for number in (*CU_LAUNCH_KERNEL, *CU_LAUNCH_KERNEL_EX):
            status = cupti.cuptiEnableCallback(1, subscriber, DRIVER_API, number)
            _check(cupti, "cuptiEnableCallback", status)
        yield
    finally:
        cupti.cuptiUnsubscribe(subscriber)


def _launch(number: int, parameters: int) -> KernelLaunch:
    if number in CU_LAUNCH_KERNEL:
        plain = ctypes.cast(parameters, ctypes.POINTER(LaunchParameters)).contents
        function, configuration = plain.function, plain.configuration
    else:
        extended = ctypes.cast(parameters, ctypes.POINTER(LaunchExParameters)).contents
        function, configuration = extended.function, extended.configuration.contents
    return KernelLaunch(function, configuration.shared_bytes, configuration.stream)


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
        f"a TensorRT engine needs CUPTI of CUDA 13 ({errors[0]}); install it with "
        "`pip install nvidia-cuda-cupti`"
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
