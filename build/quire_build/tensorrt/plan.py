"""A plan: a lowered model.onnx built by TensorRT for one GPU.

What a step may look like, in optimization profiles, and how large the pool may be, is decided here.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import contextlib
import ctypes
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from quire.errors import BuildError, StartupError
from quire.execution.engine_state import MAX_POOLS, POOL_HEADER_BYTES, STEP_ELEMENTS, engine_state_elements
from quire.execution.manifest import EngineLimits, PlanDetails
from quire.execution.tensorrt.launches import load_cupti
from quire.execution.tensorrt.library import DRIVER_LIBRARY, TensorRTLog, tensorrt_module
from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES, allow_shared_memory
from quire_build.engine_builder import Progress
from quire_build.quantization import Quantization
from quire_build.tensorrt.cold_cache import ColdCache
from quire_build.tensorrt.lowering import lower
from quire_build.tensorrt.machine import Gpu, this_gpu
from quire_build.tensorrt.network import NetworkWriter, PoolLayout
from quire_build.tensorrt.plugins import register_plugins

PROFILE_ENDS = (16, 32, 64, 128, 192, 256, 384, 512, 1024)
"""Tokens at which a profile ends and the next begins: kernels want other tiles beyond.

TensorRT times tiles at a profile's end: what is fastest at 256 or 512 tokens is not at 192 or 384.
"""
FP8_ARCHITECTURE = 89
"""Compute capability from which on GPUs convert e4m3."""
LARGEST_TENSOR = 2**31 - 1
"""Elements of a tensor, at most."""
POOL_ELEMENT_BYTES = 8

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PlanOptions:
    """What a plan is built for.

    Attributes:
        dtype: of weights and activations.
        kv_dtype: of the pool, `dtype` or e4m3.
        limits: largest steps.
        block_size: tokens of a block, as model.onnx has it.
        kv_bytes_per_block: of all layers.
        pool_bytes: size of the pool if whoever binds the inputs gives them their largest shape, as Triton's
            backend does; 0 if the pool is bound by its address, whatever its size.
        quantization: of linear layers; None for none.
        timing_cache: file in which TensorRT keeps what it measured, read if there and written afterwards if
            that can be done.
    """

    dtype: torch.dtype
    kv_dtype: torch.dtype
    limits: EngineLimits
    block_size: int
    kv_bytes_per_block: int
    pool_bytes: int = 0
    quantization: Quantization | None = None
    timing_cache: Path | None = None

    @property
    def hosted(self) -> bool:
        """Whether Triton's backend runs the plan."""
        return bool(self.pool_bytes)

    @property
    def pool(self) -> PoolLayout:
        """How the pool is laid out over the plan's inputs.

        Raises:
            BuildError: no pool of this size can be bound.
        """
        # Slots are int32.
        most = (2**31 - 1) // self.block_size
        if not self.hosted:
            return PoolLayout(max_blocks=most, num_pools=1, blocks_per_pool=most)
        max_blocks = min(self.pool_bytes // self.kv_bytes_per_block, most)
        largest_bytes = LARGEST_TENSOR * POOL_ELEMENT_BYTES - POOL_HEADER_BYTES
        blocks_per_pool = largest_bytes // self.kv_bytes_per_block
        num_pools = -(-max_blocks // blocks_per_pool)
        if max_blocks < 2 or num_pools > MAX_POOLS:
            raise BuildError(
                f"the KV pool would be {self.pool_bytes} bytes; it must be {2 * self.kv_bytes_per_block} to "
                f"{MAX_POOLS * blocks_per_pool * self.kv_bytes_per_block}"
            )
        return PoolLayout(max_blocks, num_pools, min(blocks_per_pool, max_blocks))


@dataclass(frozen=True)
class BuiltPlan:
    """A plan in memory.

    Attributes:
        data: the plan's bytes, in memory of TensorRT's; a buffer.
        details: what has to be known to drive it.
        tensorrt_version: that it was built with and must be run with.
    """

    data: Any = field(repr=False)
    details: PlanDetails
    tensorrt_version: str


def build_plan(
    model: onnx.ModelProto,
    weight: Callable[[str], Tensor],
    options: PlanOptions,
    progress: Progress = lambda message: None,
) -> BuiltPlan:
    """Lower `model`, in place, and build it on the GPU of this machine.

    Args:
        model: model.onnx, with or without its weights' data.
        weight: the checkpoint's tensors by name.
        options: what to build for.
        progress: is told about each stage, a line at a time.

    Raises:
        UnsupportedModelError: naming what a plan cannot run.
        BuildError: there is no TensorRT, no GPU or no CUPTI, or TensorRT failed.
        StartupError: a profiler uses CUPTI in this process.
    """
    trt, gpu = tensorrt_module(), this_gpu()
    pool = options.pool
    if gpu.architecture < FP8_ARCHITECTURE:
        capability = f"{gpu.architecture // 10}.{gpu.architecture % 10}"
        quantization = options.quantization
        if quantization is not None and quantization.narrow == "fp8":
            weights_alone = "" if quantization.inputs else "-weights"
            raise BuildError(
                f"precision is 'fp8{weights_alone}', which takes compute capability 8.9 or newer; {gpu.name} "
                f"has {capability}: --precision int8{weights_alone} takes as few bytes"
            )
        if options.kv_dtype == torch.float8_e4m3fn:
            raise BuildError(
                f"kv_cache_dtype is 'fp8', which takes compute capability 8.9 or newer; {gpu.name} has "
                f"{capability}: --kv-cache-dtype auto keeps the model's type"
            )
    cold_cache = _cold_cache(gpu)
    # Nobody is there to raise the limit where Triton launches the kernels.
    shared_bytes = DEFAULT_SHARED_BYTES if options.hosted else gpu.shared_bytes
    progress(f"lowering the graph for {gpu.name}")
    lower(model, options.quantization)
    register_plugins(gpu.architecture)
    logger = TensorRTLog(trt)
    builder = trt.Builder(logger.tensorrt)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS))
    writer = NetworkWriter(
        network,
        model,
        weight,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        quantization=options.quantization,
        shared_bytes=shared_bytes,
        multiprocessors=gpu.multiprocessors,
        pool=pool,
        max_num_seqs=options.limits.max_num_seqs,
    )
    writer.write()

    config = builder.create_builder_config()
    # Kernels write through their inputs and count in one place: one after the other.
    config.max_aux_streams = 0
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _progress_monitor(trt, progress)
    cache = set_timing_cache(config, options.timing_cache)
    ranges = profile_ranges(options.limits)
    for tokens in ranges:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in step_shapes(options, pool, tokens).items():
            profile.set_shape(name, smallest, usual, largest)
        config.add_optimization_profile(profile)
    progress(f"building with TensorRT {trt.__version__} for {len(ranges)} ranges of tokens")
    with allow_shared_memory(shared_bytes, cold_cache):
        data = builder.build_serialized_network(network, config)
    if data is None:
        raise BuildError(f"TensorRT cannot build the plan: {logger.last_error}")
    if options.timing_cache is not None:
        keep_timing_cache(options.timing_cache, bytes(cache.serialize()), progress)
    details = PlanDetails(
        max_blocks=pool.max_blocks,
        num_pools=pool.num_pools,
        blocks_per_pool=pool.blocks_per_pool,
        profiles=ranges,
        step_sizes=step_sizes(options.limits),
        kernel_shared_bytes=shared_bytes,
        gpu_architecture=gpu.architecture,
        gpu_name=gpu.name,
    )
    return BuiltPlan(data, details, trt.__version__)


def _cold_cache(gpu: Gpu) -> ColdCache:
    """What makes the cache cold, once it is sure that launches can be seen.

    Raises:
        BuildError: they cannot.
    """
    try:
        load_cupti(ctypes.CDLL)
        return ColdCache(ctypes.CDLL(DRIVER_LIBRARY), gpu.l2_bytes)
    except (StartupError, OSError) as error:
        raise BuildError(f"a plan cannot be built here: {error}") from None


def profile_ranges(limits: EngineLimits) -> tuple[tuple[int, int], ...]:
    """Fewest and most tokens of a step for each profile: disjoint, so that a step fits one."""
    most = limits.max_num_batched_tokens
    ends = [*(end for end in PROFILE_ENDS if end < most), most]
    starts = [1, *(end + 1 for end in ends[:-1])]
    return tuple(zip(starts, ends, strict=True))


def step_sizes(limits: EngineLimits) -> tuple[int, ...]:
    """Numbers of tokens that steps are padded to.

    Powers of two, one and a half times those from 8 on, and the limits themselves.
    """
    most = limits.max_num_batched_tokens
    powers = [1 << exponent for exponent in range(most.bit_length())]
    sizes = {*powers, *(power * 3 // 2 for power in powers if power >= 8), limits.max_num_seqs, most}
    return tuple(sorted(size for size in sizes if size <= most))


def step_shapes(
    options: PlanOptions, pool: PoolLayout, tokens: tuple[int, int]
) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Shapes of each input in steps of one range of tokens: smallest, the one to be fastest at, largest."""
    fewest, most = tokens
    limits = options.limits
    seqs = min(most, limits.max_num_seqs)
    blocks = -(-limits.max_model_len // options.block_size)
    shapes: dict[str, tuple[Shape, Shape, Shape]] = {
        **dict.fromkeys(("input_ids", "positions", "slot_mapping"), ((fewest,), (most,), (most,))),
        "block_tables": ((1, 1), (seqs, blocks), (seqs, blocks)),
        "query_start_loc": ((2,), (seqs + 1,), (seqs + 1,)),
        "seq_lens": ((1,), (seqs,), (seqs,)),
        "logits_indices": ((1,), (seqs,), (seqs,)),
        "sampling": ((1, 5), (seqs, 5), (seqs, 5)),
        "step": ((STEP_ELEMENTS,),) * 3,
    }
    state = engine_state_elements(limits.max_num_seqs)
    shapes["engine_state"] = ((1,), (state,), (state,))
    for number, name in enumerate(pool.input_names):
        elements = 1
        if options.hosted:
            blocks_here = min(pool.blocks_per_pool, pool.max_blocks - number * pool.blocks_per_pool)
            header_bytes = POOL_HEADER_BYTES if number else 0
            elements = (header_bytes + blocks_here * options.kv_bytes_per_block) // POOL_ELEMENT_BYTES
        shapes[name] = ((1,), (1,), (elements,))
    return shapes


def set_timing_cache(config: Any, path: Path | None) -> Any:
    """Give the build a timing cache with what the file holds, if it can be used here, and return it."""
    known = b""
    if path is not None:
        with contextlib.suppress(OSError):
            known = path.read_bytes()
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def keep_timing_cache(path: Path, data: bytes, progress: Progress) -> None:
    """Put what TensorRT measured into a file, whole or not at all; the plan is not lost where that fails."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(data)
        draft.replace(path)
    except OSError as error:
        progress(
            f"what TensorRT measured cannot be kept in {path.parent} ({error.strerror}), so the next build "
            "measures again; set XDG_CACHE_HOME to a folder that has room and may be written to"
        )
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _progress_monitor(trt: Any, progress: Progress) -> Any:
    """Passes the phases of a build on, the top ones only, at every tenth."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            steps = self._steps.get(phase_name)
            if steps and (step + 1) * 10 // steps > step * 10 // steps:
                progress(f"{phase_name}: {(step + 1) * 100 // steps}%")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()
