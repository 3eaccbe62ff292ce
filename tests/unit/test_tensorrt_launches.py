"""What CUPTI is asked for, and what happens before a launch: limits raised, the cache made cold."""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass, field
from typing import Any

import pytest

from quire.errors import StartupError
from quire.execution.tensorrt.launches import (
    CU_LAUNCH_KERNEL,
    CU_LAUNCH_KERNEL_EX,
    CUPTI_LIBRARIES,
    DRIVER_API,
    ENTER,
    MULTIPLE_SUBSCRIBERS,
    CallbackData,
    Configuration,
    KernelLaunch,
    LaunchExParameters,
    LaunchParameters,
    load_cupti,
    watch_launches,
)
from quire.execution.tensorrt.library import DRIVER_LIBRARY
from quire.execution.tensorrt.shared_memory import (
    DEFAULT_SHARED_BYTES,
    MAX_DYNAMIC_SHARED_SIZE,
    LimitRaiser,
    allow_shared_memory,
)
from quire_build.tensorrt.cold_cache import ColdCache

EXIT = 1
FUNCTION = 0x7F0012345678
"""A handle that needs all 64 bits."""
GPU = 3
MORE = 227 * 1024
STREAM = 0x7F00DEADBEE8


@dataclass
class Driver:
    """CUDA's driver API as far as limits go; notes its calls, with plain numbers."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    knows_functions: bool = True
    """Whether handles are functions; else they are kernels of a library."""

    def cuFuncSetAttribute(self, function: Any, attribute: int, value: Any) -> int:  # noqa: N802
        self.calls.append(("function", function.value, attribute, value.value))
        return 0 if self.knows_functions else 400

    def cuCtxGetDevice(self, gpu: Any) -> int:  # noqa: N802
        gpu._obj.value = GPU
        return 0

    def cuKernelSetAttribute(self, attribute: int, value: Any, kernel: Any, gpu: Any) -> int:  # noqa: N802
        self.calls.append(("kernel", kernel.value, attribute, value.value, gpu.value))
        return 0

    def cuMemsetD32Async(self, memory: Any, value: Any, words: Any, stream: Any) -> int:  # noqa: N802
        self.calls.append(("memset", memory.value, value.value, words.value, stream.value))
        return 0


@dataclass
class Cupti:
    """CUPTI; notes its calls, and shows the launches that it is told of."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)
    callback: Any = None

    def cuptiSubscribe(self, subscriber: Any, callback: Any, user: Any) -> int:  # noqa: N802
        self.calls.append(("subscribe",))
        if status := self.failures.get("cuptiSubscribe", 0):
            return status
        assert user is None
        subscriber._obj.value, self.callback = 0x500, callback
        return 0

    def cuptiEnableCallback(self, enable: int, subscriber: Any, domain: int, number: int) -> int:  # noqa: N802
        assert subscriber.value == 0x500
        self.calls.append(("enable", enable, domain, number))
        return self.failures.get("cuptiEnableCallback", 0)

    def cuptiUnsubscribe(self, subscriber: Any) -> int:  # noqa: N802
        assert subscriber.value == 0x500
        self.calls.append(("unsubscribe",))
        self.callback = None
        return 0

    def cuptiGetResultString(self, status: int, text: Any) -> int:  # noqa: N802
        if status == 999:
            return 1
        text._obj.value = f"CUPTI_ERROR_{status}".encode()
        return 0


@dataclass
class Libraries:
    """Opens the stand-ins by the names of the shared libraries."""

    cupti: Cupti = field(default_factory=Cupti)
    driver: Driver = field(default_factory=Driver)
    opened: list[str] = field(default_factory=list)

    def __call__(self, name: str) -> Any:
        self.opened.append(name)
        return self.driver if name == DRIVER_LIBRARY else self.cupti


def launch(
    callback: Any, number: int, shared_bytes: int, *, site: int = ENTER, stream: int | None = STREAM
) -> None:
    """Tell of a launch of FUNCTION, as CUPTI would."""
    configuration = Configuration((132, 1, 8), (256, 1, 1), shared_bytes, stream)
    parameters: ctypes.Structure
    if number in CU_LAUNCH_KERNEL:
        parameters = LaunchParameters(FUNCTION, configuration)
    else:
        parameters = LaunchExParameters(ctypes.pointer(configuration), FUNCTION)
    data = CallbackData(site, b"cuLaunch", ctypes.addressof(parameters))
    callback(None, DRIVER_API, number, ctypes.pointer(data))


EVERY_LAUNCH = (*CU_LAUNCH_KERNEL, *CU_LAUNCH_KERNEL_EX)


def test_the_structures_lie_as_cuda_and_cupti_declare_them() -> None:
    """CUpti_CallbackData, cuLaunchKernel_params, CUlaunchConfig and cuLaunchKernelEx_params."""
    assert (CallbackData.site.offset, CallbackData.function_name.offset) == (0, 8)
    assert CallbackData.parameters.offset == 16
    assert (Configuration.grid.offset, Configuration.block.offset) == (0, 12)
    assert (Configuration.shared_bytes.offset, Configuration.stream.offset) == (24, 32)
    # cuLaunchKernel's parameters are its arguments one after another, so the stream comes at 40.
    assert (LaunchParameters.function.offset, LaunchParameters.configuration.offset) == (0, 8)
    assert (LaunchExParameters.configuration.offset, LaunchExParameters.function.offset) == (0, 8)


@pytest.mark.parametrize("number", EVERY_LAUNCH)
@pytest.mark.parametrize("stream", [None, STREAM])
def test_every_watcher_sees_a_launch_once_before_it_happens(number: int, stream: int | None) -> None:
    libraries = Libraries()
    first: list[KernelLaunch] = []
    second: list[KernelLaunch] = []
    with watch_launches(first.append, second.append, load=libraries):
        launch(libraries.cupti.callback, number, MORE, stream=stream)
        assert first == second == [KernelLaunch(FUNCTION, MORE, stream)]
        launch(libraries.cupti.callback, number, MORE, site=EXIT)
    assert len(first) == len(second) == 1


@pytest.mark.parametrize("shared_bytes", [DEFAULT_SHARED_BYTES + 1, MORE])
def test_a_function_gets_the_limit_that_its_launch_wants(shared_bytes: int) -> None:
    driver = Driver()
    LimitRaiser(driver)(KernelLaunch(FUNCTION, shared_bytes, STREAM))
    assert driver.calls == [("function", FUNCTION, MAX_DYNAMIC_SHARED_SIZE, shared_bytes)]


@pytest.mark.parametrize("shared_bytes", [0, 1024, DEFAULT_SHARED_BYTES])
def test_a_function_that_wants_no_more_than_all_have_is_left_alone(shared_bytes: int) -> None:
    driver = Driver()
    LimitRaiser(driver)(KernelLaunch(FUNCTION, shared_bytes, STREAM))
    assert not driver.calls


def test_a_kernel_of_a_library_gets_its_limit_on_the_gpu_of_the_context() -> None:
    driver = Driver(knows_functions=False)
    LimitRaiser(driver)(KernelLaunch(FUNCTION, MORE, STREAM))
    assert driver.calls == [
        ("function", FUNCTION, MAX_DYNAMIC_SHARED_SIZE, MORE),
        ("kernel", FUNCTION, MAX_DYNAMIC_SHARED_SIZE, MORE, GPU),
    ]


def test_a_limit_is_raised_again_as_a_new_function_may_have_the_place_of_an_old_one() -> None:
    driver = Driver()
    raiser = LimitRaiser(driver)
    for _ in range(2):
        raiser(KernelLaunch(FUNCTION, MORE, STREAM))
    assert len(driver.calls) == 2


@pytest.mark.parametrize("stream", [None, STREAM])
def test_twice_the_cache_is_written_on_the_stream_of_a_launch(stream: int | None) -> None:
    driver = Driver()
    ColdCache(driver, 1 << 20, device="cpu")(KernelLaunch(FUNCTION, 0, stream))
    ((name, memory, value, words, on),) = driver.calls
    assert (name, value, 4 * words, on) == ("memset", 0, 2 << 20, stream)
    assert memory


def test_the_cache_is_made_cold_where_every_program_has_enough_shared_memory_too() -> None:
    libraries = Libraries()
    with allow_shared_memory(DEFAULT_SHARED_BYTES, ColdCache(libraries.driver, 64, "cpu"), load=libraries):
        launch(libraries.cupti.callback, CU_LAUNCH_KERNEL[0], 0)
    assert [call[0] for call in libraries.driver.calls] == ["memset"]


@pytest.mark.parametrize("most_bytes", [1, DEFAULT_SHARED_BYTES])
def test_nothing_is_loaded_where_every_program_has_enough(most_bytes: int) -> None:
    libraries = Libraries()
    with allow_shared_memory(most_bytes, load=libraries):
        pass
    assert not libraries.opened


SUBSCRIBED = [("subscribe",), *(("enable", 1, DRIVER_API, number) for number in EVERY_LAUNCH)]


def test_launches_are_watched_meanwhile_and_not_later() -> None:
    libraries = Libraries()
    with allow_shared_memory(MORE, load=libraries):
        assert libraries.cupti.calls == SUBSCRIBED
        launch(libraries.cupti.callback, CU_LAUNCH_KERNEL_EX[0], MORE)
    assert libraries.driver.calls == [("function", FUNCTION, MAX_DYNAMIC_SHARED_SIZE, MORE)]
    assert libraries.cupti.calls == [*SUBSCRIBED, ("unsubscribe",)]


def test_launches_are_watched_no_longer_once_something_failed() -> None:
    libraries = Libraries()
    with pytest.raises(ZeroDivisionError), allow_shared_memory(MORE, load=libraries):
        raise ZeroDivisionError
    assert libraries.cupti.calls == [*SUBSCRIBED, ("unsubscribe",)]


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (MULTIPLE_SUBSCRIBERS, r"CUPTI_ERROR_39; a profiler in this process is in the way$"),
        (7, r"CUPTI_ERROR_7$"),
        (999, r"999$"),
    ],
)
def test_a_subscription_that_cupti_refuses_is_an_error_with_its_reason(status: int, reason: str) -> None:
    libraries = Libraries(Cupti(failures={"cuptiSubscribe": status}))
    with (
        pytest.raises(StartupError, match=f"CUPTI cannot be used: cuptiSubscribe failed with {reason}"),
        allow_shared_memory(MORE, load=libraries),
    ):
        pytest.fail("it is not allowed")
    assert libraries.cupti.calls == [("subscribe",)]


def test_a_callback_that_cupti_refuses_ends_the_subscription() -> None:
    libraries = Libraries(Cupti(failures={"cuptiEnableCallback": 7}))
    with (
        pytest.raises(StartupError, match=r"cuptiEnableCallback failed with CUPTI_ERROR_7$"),
        allow_shared_memory(MORE, load=libraries),
    ):
        pytest.fail("it is not allowed")
    assert libraries.cupti.calls == [*SUBSCRIBED[:2], ("unsubscribe",)]


def test_without_cupti_the_error_says_what_to_install() -> None:
    def load(name: str) -> Any:
        if name == DRIVER_LIBRARY:
            return Driver()
        raise OSError(f"{name}: cannot open shared object file")

    with (
        pytest.raises(StartupError, match=r"needs CUPTI .*cannot open.* `pip install nvidia-cuda-cupti`"),
        allow_shared_memory(MORE, load=load),
    ):
        pytest.fail("it is not allowed")


def test_cupti_of_the_package_precedes_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    library = tmp_path / "cu13" / "lib" / "libcupti.so.13"
    library.parent.mkdir(parents=True)
    library.touch()
    tried: list[str] = []

    def load(name: str) -> str:
        tried.append(name)
        if name == CUPTI_LIBRARIES[-1]:
            return "the last"
        raise OSError(name)

    namespace = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "other"), str(tmp_path)]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: namespace)
    assert load_cupti(load) == "the last"
    assert tried == [str(library), *CUPTI_LIBRARIES]
    tried.clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load_cupti(load) == "the last"
    assert tried == [*CUPTI_LIBRARIES]
