"""The GPU that plans are built on and for."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import statistics
from dataclasses import dataclass

from quire.errors import BuildError

BANDWIDTH_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU that this process sees."""

    name: str
    architecture: int
    """Compute capability, 90 for 9.0."""
    memory_bytes: int
    shared_bytes: int
    """Shared memory of one program, at most."""
    multiprocessors: int
    l2_bytes: int


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
        properties.multi_processor_count,
        properties.L2_cache_size,
    )


def copy_bandwidth_gb_s() -> float:
    """Device-to-device copies: bytes read plus bytes written, over the median time.

    Not in a graph: there a copy is a node of its own kind, and took half as long again on an H200.
    """
    import torch

    source = torch.ones(BANDWIDTH_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    del source, target
    torch.cuda.empty_cache()
    return float(2 * BANDWIDTH_BYTES / statistics.median(times[2:]) / 1e6)
