"""A TensorRT plan run in this process: pinned staging, CUDA graphs, tokens fed back on the GPU."""

from __future__ import annotations

from pathlib import Path

from quire.execution.manifest import EngineLimits
from quire.execution.tensorrt.cuda import CudaDevice
from quire.execution.tensorrt.engine import TensorRTEngine
from quire.execution.tensorrt.executor import TensorRTExecutor
from quire.execution.tensorrt.plan import TensorRTPlan


def load_plan(
    engine_dir: Path,
    *,
    kv_cache_bytes: int = 0,
    gpu_memory_utilization: int = 90,
    limits: EngineLimits | None = None,
    return_logits: bool = False,
) -> TensorRTExecutor:
    """Load the plan in `engine_dir` on the first visible GPU and make it ready.

    Args:
        engine_dir: holds model.plan and engine.json.
        kv_cache_bytes: size of the KV pool; 0 takes what `gpu_memory_utilization` leaves.
        gpu_memory_utilization: percent of the GPU's memory that may be in use in the end.
        limits: what will be asked for at most; None takes the manifest's.
        return_logits: whether steps that are sampled return their logits too.

    Raises:
        StartupError: there is no GPU or no TensorRT, the plan was built for others, or the pool cannot hold
            one request of full length.
    """
    device = CudaDevice()
    plan = TensorRTPlan(engine_dir, device)
    engine = TensorRTEngine(
        plan,
        device,
        limits or plan.manifest.limits,
        kv_cache_bytes=kv_cache_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    return TensorRTExecutor(engine, return_logits=return_logits)
