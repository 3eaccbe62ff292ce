"""The GPU that plans are built on and for."""

from __future__ import annotations

from dataclasses import dataclass

from quire.errors import BuildError


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU that this process sees."""

    name: str
    architecture: int
    """Compute capability, 90 for 9.0."""
    memory_bytes: int
    shared_bytes: int
    """Shared memory of one program, at most."""


def this_gpu() -> Gpu:
    """The GPU that a plan built here is for.

    Raises:
        BuildError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise BuildError("a TensorRT engine is built on the GPU that it is for, and this machine has none")
    properties = torch.cuda.get_device_properties(0)
    return Gpu(
        properties.name,
        10 * properties.major + properties.minor,
        properties.total_memory,
        properties.shared_memory_per_block_optin,
    )
