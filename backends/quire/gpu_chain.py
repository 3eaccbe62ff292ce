"""The chain that a TensorRT engine hangs on: GPU, driver, CUDA, TensorRT, torch, and a repository's plan.

What is there is read without starting any of it: the driver from its own libraries, versions from packages'
metadata. `quire doctor` shows it, with a remedy for each pair that does not fit.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quire.errors import StartupError
from quire.execution.manifest import Manifest, PlanDetails
from quire.execution.tensorrt.launches import load_cupti
from quire.execution.tensorrt.library import DRIVER_LIBRARY
from quire.execution.tensorrt.library import MAJOR_VERSION as TENSORRT_MAJOR
from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES

Version = tuple[int, int]

CUDA_OF_TENSORRT: Version = (13, 0)
DRIVER_OF_CUDA_13 = 580
"""First branch of the driver that runs CUDA 13."""
SMALLEST_CAPABILITY: Version = (7, 5)
"""Of a GPU that CUDA 13 supports."""

TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu13-bindings")
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
"""Numbers of the attributes in CUDA's driver API."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report."""

    subject: str
    state: str
    remedy: str = ""
    """What to do; empty where nothing has to be done."""


@dataclass(frozen=True, slots=True)
class FoundGpu:
    """A GPU that the driver offers this process."""

    name: str
    capability: Version
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class GpuMachine:
    """What is installed. None: it is not there."""

    driver: str | None = None
    """Version, as in 580.65.06; empty where the driver is there but does not say."""
    driver_cuda: Version | None = None
    """Newest CUDA that the driver runs."""
    driver_error: str = ""
    """Why the driver cannot be used; empty if it can."""
    gpus: tuple[FoundGpu, ...] = ()
    tensorrt: str | None = None
    cuda_bindings: str | None = None
    cupti: bool = False
    """Whether CUPTI of CUDA 13 is there."""
    torch: str | None = None
    torch_cuda: Version | None = None
    """None where torch is there: it was built without CUDA."""


def look(load: Callable[[str], Any] = ctypes.CDLL) -> GpuMachine:
    """What this machine has; `load` opens a shared library or raises OSError."""
    machine = GpuMachine(
        tensorrt=next(filter(None, map(_version, TENSORRT_PACKAGES)), None),
        cuda_bindings=_version("cuda-bindings"),
        cupti=_has_cupti(load),
        torch=_version("torch"),
        torch_cuda=_cuda_of_torch(),
    )
    try:
        cuda = load(DRIVER_LIBRARY)
    except OSError:
        return machine
    return _with_driver(replace(machine, driver=_driver_version(load)), cuda)


def examine_chain(machine: GpuMachine, plan: Manifest | None = None) -> Iterator[Finding]:
    """Hold every link against its neighbours.

    Args:
        machine: what is installed.
        plan: manifest of the TensorRT engine that is to run here; without one, a missing link is no fault.
    """
    wanted = plan is not None
    yield _driver(machine, wanted)
    for number, gpu in enumerate(machine.gpus):
        yield _gpu(number, gpu, plan)
    yield _tensorrt(machine, plan)
    yield _cuda_bindings(machine, wanted)
    yield _cupti(machine, plan.plan if plan is not None else None)
    if machine.torch is not None and machine.gpus:
        yield _torch(machine)


def _driver(machine: GpuMachine, wanted: bool) -> Finding:
    install = f"install NVIDIA's driver {DRIVER_OF_CUDA_13} or newer; for a container, docker run --gpus all"
    if machine.driver is None:
        return Finding("nvidia driver", "none; only TensorRT engines need it", install if wanted else "")
    state = machine.driver or "of unknown version"
    if machine.driver_error:
        return Finding("nvidia driver", f"{state}, not usable: {machine.driver_error}", install)
    if machine.driver_cuda is None:
        return Finding("nvidia driver", state)
    state += f", for CUDA up to {_dotted(machine.driver_cuda)}"
    needed = wanted or _major(machine.tensorrt) == TENSORRT_MAJOR
    if needed and machine.driver_cuda < CUDA_OF_TENSORRT:
        return Finding(
            "nvidia driver",
            state,
            f"TensorRT {TENSORRT_MAJOR} is made for CUDA {_dotted(CUDA_OF_TENSORRT)}, which needs driver "
            f"{DRIVER_OF_CUDA_13} or newer; update the driver",
        )
    return Finding("nvidia driver", state)


def _gpu(number: int, gpu: FoundGpu, plan: Manifest | None) -> Finding:
    subject = f"gpu {number}"
    state = f"{gpu.name}, compute capability {_dotted(gpu.capability)}, {gpu.memory_bytes >> 20} MiB"
    if gpu.capability < SMALLEST_CAPABILITY:
        oldest = _dotted(SMALLEST_CAPABILITY)
        return Finding(
            subject, state, f"TensorRT {TENSORRT_MAJOR} needs compute capability {oldest}; use a newer GPU"
        )
    details = plan.plan if plan is not None else None
    # A plan runs on the first one.
    if details is not None and number == 0 and details.gpu_name != gpu.name:
        return Finding(
            subject,
            state,
            f"the repository's plan was built for {details.gpu_name}; build it on this machine with "
            "`quire build --runtime tensorrt`",
        )
    return Finding(subject, state)


def _tensorrt(machine: GpuMachine, plan: Manifest | None) -> Finding:
    wanted = plan is not None
    if machine.tensorrt is None:
        remedy = f"pip install 'tensorrt=={TENSORRT_MAJOR}.*', or run inside NVIDIA's tritonserver container"
        return Finding("tensorrt", "not installed; only TensorRT engines need it", remedy if wanted else "")
    if _major(machine.tensorrt) != TENSORRT_MAJOR:
        return Finding("tensorrt", machine.tensorrt, f"pip install 'tensorrt=={TENSORRT_MAJOR}.*'")
    if plan is not None and plan.runtime_version != machine.tensorrt:
        return Finding(
            "tensorrt",
            machine.tensorrt,
            f"the repository's plan was built with TensorRT {plan.runtime_version} and runs with no other; "
            f"build it again with `quire build --runtime tensorrt`, or pip install "
            f"'tensorrt=={plan.runtime_version}'",
        )
    return Finding("tensorrt", machine.tensorrt)


def _cuda_bindings(machine: GpuMachine, wanted: bool) -> Finding:
    if machine.cuda_bindings is None:
        remedy = "pip install 'cuda-bindings==13.*'" if wanted else ""
        return Finding("cuda-bindings", "not installed; only TensorRT engines need it", remedy)
    if machine.driver_cuda is not None and (_major(machine.cuda_bindings) or 0) > machine.driver_cuda[0]:
        return Finding(
            "cuda-bindings",
            machine.cuda_bindings,
            f"the driver runs CUDA up to {_dotted(machine.driver_cuda)}; update it, or pip install "
            f"'cuda-bindings=={machine.driver_cuda[0]}.*'",
        )
    return Finding("cuda-bindings", machine.cuda_bindings)


def _cupti(machine: GpuMachine, plan: PlanDetails | None) -> Finding:
    if machine.cupti:
        return Finding("cupti", "there")
    if plan is None:
        return Finding("cupti", "not there; a TensorRT engine is built with it")
    if plan.kernel_shared_bytes <= DEFAULT_SHARED_BYTES:
        return Finding("cupti", "not there, not needed by this plan")
    remedy = "pip install 'nvidia-cuda-cupti==13.*'; kernels of the repository's plan need it to start"
    return Finding("cupti", "not there", remedy)


def _torch(machine: GpuMachine) -> Finding:
    """Of interest where there is a GPU: building a plan uses it through torch."""
    subject = "torch's cuda"
    if machine.torch_cuda is None:
        remedy = "building a TensorRT engine needs a torch with CUDA: pip install torch from PyPI"
        return Finding(subject, "none", remedy if machine.tensorrt is not None else "")
    state = _dotted(machine.torch_cuda)
    if machine.driver_cuda is not None and machine.torch_cuda[0] > machine.driver_cuda[0]:
        return Finding(
            subject,
            state,
            f"the driver runs CUDA up to {_dotted(machine.driver_cuda)}; update it, or install a torch made "
            f"for CUDA {machine.driver_cuda[0]}",
        )
    return Finding(subject, state)


def _with_driver(machine: GpuMachine, cuda: Any) -> GpuMachine:
    """Add what the driver says of itself and its GPUs."""
    status = cuda.cuInit(0)
    if status:
        return replace(machine, driver_error=f"cuInit returns {status}")
    number = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(number))
    machine = replace(machine, driver_cuda=(number.value // 1000, number.value % 1000 // 10))
    cuda.cuDeviceGetCount(ctypes.byref(number))
    return replace(machine, gpus=tuple(_read_gpu(cuda, index) for index in range(number.value)))


def _read_gpu(cuda: Any, index: int) -> FoundGpu:
    device, value = ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return FoundGpu(name.value.decode(errors="replace"), (capability[0], capability[1]), memory.value)


def _driver_version(load: Callable[[str], Any]) -> str:
    """As NVML has it."""
    try:
        nvml = load("libnvidia-ml.so.1")
    except OSError:
        return ""
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text)):
        return ""
    nvml.nvmlShutdown()
    return text.value.decode(errors="replace")


def _has_cupti(load: Callable[[str], Any]) -> bool:
    try:
        load_cupti(load)
    except StartupError:
        return False
    return True


def _cuda_of_torch() -> Version | None:
    """What torch's own version file says, because importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"](\d+)\.(\d+)", text, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _major(version: str | None) -> int | None:
    found = re.match(r"\d+", version or "")
    return int(found[0]) if found else None


def _dotted(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
