"""Loading the engine with this start's settings, in whichever process runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quire.errors import ManifestError
from quire.execution.executor import Executor
from quire.execution.manifest import EngineLimits, read_manifest
from quire.settings import ServingSettings

if TYPE_CHECKING:
    from quire.execution.openvino import OpenVINOEngine


def load_engine(engine_dir: Path, settings: ServingSettings) -> OpenVINOEngine:
    """Load the CPU runtime's engine in `engine_dir` and allocate its pool.

    Args:
        engine_dir: holds the engine and its manifest.
        settings: with the manifest's limits filled in.

    Raises:
        StartupError: the engine doesn't fit this machine, or the pool cannot hold one request.
    """
    from quire.execution.openvino import OpenVINOEngine

    return OpenVINOEngine(
        engine_dir,
        kv_cache_bytes=settings.kv_cache_bytes,
        threads=settings.threads,
        limits=_limits(settings),
    )


def load_executor(engine_dir: Path, settings: ServingSettings) -> Executor:
    """Load the engine in `engine_dir` into this process; only its own runtime is imported.

    Args:
        engine_dir: holds the engine and its manifest.
        settings: with the manifest's limits filled in.

    Raises:
        StartupError: as `load_engine`, or no runtime here runs such an engine.
    """
    match read_manifest(engine_dir).runtime:
        case "openvino":
            from quire.execution.openvino import OpenVINOExecutor

            return OpenVINOExecutor(load_engine(engine_dir, settings))
        case "tensorrt":
            from quire.execution.tensorrt import load_plan

            return load_plan(
                engine_dir,
                kv_cache_bytes=settings.kv_cache_bytes,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                limits=_limits(settings),
            )
        case other:
            raise ManifestError(
                f"engine.json describes an engine for {other}, which no server runs; "
                "build it again with `quire build`"
            )


def _limits(settings: ServingSettings) -> EngineLimits:
    return EngineLimits(settings.max_num_seqs, settings.max_num_batched_tokens, settings.max_model_len)
