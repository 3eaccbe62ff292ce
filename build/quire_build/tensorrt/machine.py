"""The TensorRT and the GPU that plans are built with."""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quire.errors import BuildError

MAJOR_VERSION = "11"


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU that this process sees."""

    name: str
    architecture: int
    """Compute capability, 90 for 9.0."""
    memory_bytes: int


def tensorrt_module() -> Any:
    """The module `tensorrt`, of the version that this is written for.

    Raises:
        BuildError: it is not there, or another one is.
    """
    try:
        import tensorrt as trt
    except ImportError as error:
        raise BuildError(
            f"a TensorRT engine needs the package tensorrt of version {MAJOR_VERSION} ({error}); NVIDIA's "
            "containers have it, or install it with `pip install tensorrt`"
        ) from None
    if trt.__version__.split(".")[0] != MAJOR_VERSION:
        raise BuildError(f"TensorRT {trt.__version__} is installed; this Quire needs version {MAJOR_VERSION}")
    return trt


def this_gpu() -> Gpu:
    """The GPU that a plan built here is for.

    Raises:
        BuildError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise BuildError("a TensorRT engine is built on the GPU that it is for, and this machine has none")
    properties = torch.cuda.get_device_properties(0)
    return Gpu(properties.name, 10 * properties.major + properties.minor, properties.total_memory)
