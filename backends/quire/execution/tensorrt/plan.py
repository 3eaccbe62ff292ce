"""model.plan, deserialised by the TensorRT that it was built with on the GPU that it was built for."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Protocol

from quire.errors import ManifestError, StartupError
from quire.execution.manifest import Manifest, PlanDetails, read_manifest, verify_files
from quire.execution.tensorrt.device import Device, DeviceError
from quire.execution.tensorrt.library import TensorRTLog, tensorrt_module
from quire.interface import PLAN_FILE


class PlanContext(Protocol):
    """Shapes and addresses of one kind of step; every method may raise `DeviceError`."""

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Of an input."""
        ...

    def set_address(self, name: str, address: int) -> None:
        """Of an input or output."""
        ...

    def enqueue(self) -> None:
        """Queue the plan's kernels on the device's stream; shapes and addresses have been set."""
        ...


class Plan(Protocol):
    """A plan on a device."""

    manifest: Manifest
    details: PlanDetails
    scratch_bytes: int
    """Memory for what layers hand to each other, at most, over all profiles."""

    def context(self, profile: int, scratch: int) -> PlanContext:
        """A context for the steps of one profile. `scratch` is the address of `scratch_bytes` bytes, which
        contexts that do not run at the same time may share."""
        ...

    def close(self) -> None:
        """Free the weights; no context may be used any more."""
        ...


class TensorRTPlan:
    """`Plan` on TensorRT.

    Args:
        engine_dir: holds model.plan and engine.json.
        device: that runs it.

    Raises:
        ManifestError: engine.json or the plan is damaged, or is for another runtime, version or GPU.
        StartupError: TensorRT is not installed or cannot load the plan.
    """

    def __init__(self, engine_dir: Path, device: Device) -> None:
        self.manifest = read_manifest(engine_dir)
        trt = tensorrt_module()
        self.details = check_fit(self.manifest, trt.__version__, device)
        verify_files(self.manifest, engine_dir)
        self._trt, self._device = trt, device
        self._logger = TensorRTLog(trt)
        self._runtime = trt.Runtime(self._logger.tensorrt)
        self._engine = self._deserialize(engine_dir / PLAN_FILE)
        names = {self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)}
        expected = {*self.manifest.inputs, *self.manifest.outputs}
        if names != expected:
            raise ManifestError(
                f"{PLAN_FILE} has the tensors {', '.join(sorted(names))}, but engine.json lists "
                f"{', '.join(sorted(expected))}; build the engine again with `quire build`"
            )
        self.scratch_bytes = max(
            self._engine.get_device_memory_size_for_profile_v2(profile)
            for profile in range(len(self.details.profiles))
        )

    def context(self, profile: int, scratch: int) -> TensorRTContext:
        """A context for the steps of one profile."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise DeviceError(f"TensorRT cannot create a context: {self._logger.last_error}")
        if not context.set_optimization_profile_async(profile, self._device.stream):
            raise DeviceError(f"TensorRT cannot select profile {profile}: {self._logger.last_error}")
        if self.scratch_bytes:
            context.set_device_memory(scratch, self.scratch_bytes)
        return TensorRTContext(context, self._device, self._logger)

    def close(self) -> None:
        """Free the weights."""
        self._engine = self._runtime = None

    def _deserialize(self, path: Path) -> Any:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise StartupError(
                f"TensorRT cannot load {path}: {self._logger.last_error}; "
                "build the engine again with `quire build --runtime tensorrt`"
            )
        return engine


class TensorRTContext:
    """`PlanContext` on TensorRT."""

    def __init__(self, context: Any, device: Device, logger: TensorRTLog) -> None:
        self._context, self._device, self._logger = context, device, logger

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Of an input."""
        if not self._context.set_input_shape(name, shape):
            raise DeviceError(f"TensorRT refuses {list(shape)} for {name}: {self._logger.last_error}")

    def set_address(self, name: str, address: int) -> None:
        """Of an input or output."""
        if not self._context.set_tensor_address(name, address):
            raise DeviceError(f"TensorRT refuses the address of {name}: {self._logger.last_error}")

    def enqueue(self) -> None:
        """Queue the plan's kernels."""
        if not self._context.execute_async_v3(self._device.stream):
            raise DeviceError(f"TensorRT cannot run a step: {self._logger.last_error}")


def check_fit(manifest: Manifest, tensorrt_version: str, device: Device) -> PlanDetails:
    """Refuse a plan that was built for something else than what is here.

    Raises:
        ManifestError: naming what the plan needs and what was found.
    """
    details = manifest.plan
    if manifest.runtime != "tensorrt" or details is None:
        raise ManifestError(
            f"engine.json describes an engine for {manifest.runtime}, not a TensorRT plan; "
            "build it again with `quire build --runtime tensorrt`"
        )
    found = device.properties
    for what, expected, actual in (
        ("TensorRT", manifest.runtime_version, tensorrt_version),
        (
            "a GPU of compute capability",
            _capability(details.gpu_architecture),
            _capability(found.architecture),
        ),
        ("the GPU", details.gpu_name, found.name),
    ):
        if actual != expected:
            raise ManifestError(
                f"the plan was built for {what} {expected}, but {actual} was found; build it again on this "
                "machine with `quire build --runtime tensorrt`"
            )
    return details


def _capability(architecture: int) -> str:
    return f"{architecture // 10}.{architecture % 10}"
