"""Loading the CPU runtime's engine with this start's settings, in whichever process runs it."""

from __future__ import annotations

from pathlib import Path

from quire.execution.manifest import EngineLimits
from quire.execution.openvino import OpenVINOEngine
from quire.settings import ServingSettings


def load_engine(engine_dir: Path, settings: ServingSettings) -> OpenVINOEngine:
    """Load the engine in `engine_dir` and allocate its pool.

    Args:
        engine_dir: holds the engine and its manifest.
        settings: with the manifest's limits filled in.

    Raises:
        StartupError: the engine doesn't fit this machine, or the pool cannot hold one request.
    """
    return OpenVINOEngine(
        engine_dir,
        kv_cache_bytes=settings.kv_cache_bytes,
        threads=settings.threads,
        limits=EngineLimits(settings.max_num_seqs, settings.max_num_batched_tokens, settings.max_model_len),
    )
