"""What the pipeline asks of a runtime: an engine from a checkpoint, and a way to run it for the gate.

There is one builder for each runtime: `openvino_engine` for CPUs, `tensorrt.builder` for NVIDIA's GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from quire.execution.executor import Executor
from quire.execution.manifest import (
    MANIFEST_VERSION,
    EngineLimits,
    GateReport,
    KvCacheDtype,
    Manifest,
    ModelDimensions,
    PlanDetails,
    Precision,
    Runtime,
    file_digest,
)
from quire.interface import EnginePlacement
from quire_build.checkpoint import Checkpoint
from quire_build.decoder_config import DecoderConfig
from quire_build.workload import Workload

Progress = Callable[[str], None]

KV_ELEMENT_BYTES: Mapping[KvCacheDtype, int] = {"float32": 4, "bf16": 2, "fp16": 2, "fp8": 1}


class EngineOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine is built for.

    Attributes:
        precision: of the arithmetic.
        kv_cache_dtype: of the pool.
        limits: largest steps.
        placement: who will load it.
        gpu_memory_utilization: percent of the GPU's memory that weights, pool and scratch take together; it
            matters where the pool's size is part of the engine.
    """

    precision: Precision
    kv_cache_dtype: KvCacheDtype
    limits: EngineLimits
    placement: EnginePlacement
    gpu_memory_utilization: int


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """What a builder left in the engine's directory, as its manifest says it.

    Attributes:
        files: names of the engine's files.
        inputs: names of the step tensors that it takes.
        outputs: names of what it returns.
        plan: of a TensorRT engine.
    """

    files: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    plan: PlanDetails | None = None


class EngineBuilder(Protocol):
    """Builds engines for one runtime. All but building and running one does without torch.

    Attributes:
        runtime: its name in the manifest.
        block_size: tokens in a block of the pool.
        kv_cache_dtypes: types that the pool may have, by the precisions that there are; the first is the
            precision's own.
        reference_device: where torch runs the module that the engine is held against.
        default_placement: where its engines run unless the build says otherwise.
    """

    runtime: Runtime
    block_size: int
    kv_cache_dtypes: Mapping[Precision, tuple[KvCacheDtype, ...]]
    reference_device: str
    default_placement: EnginePlacement

    def version(self) -> str:
        """The runtime's version.

        Raises:
            BuildError: the runtime is not there.
        """

    def target(self) -> str:
        """The kind of machine that an engine built here is for; empty where any will do.

        Raises:
            BuildError: this machine cannot build one.
        """

    def build(
        self, source: Checkpoint, options: EngineOptions, directory: Path, progress: Progress
    ) -> BuiltEngine:
        """Leave the engine's files in `directory`.

        Raises:
            BuildError: the runtime refuses, or something that it needs is missing.
        """

    def executor(self, directory: Path, manifest: Manifest, workload: Workload) -> Executor:
        """Load the engine in `directory` as a server would, but with a pool for `workload`, for logits."""


def engine_manifest(
    config: DecoderConfig,
    builder: EngineBuilder,
    options: EngineOptions,
    built: BuiltEngine,
    directory: Path,
    checkpoint_digest: str,
) -> Manifest:
    """The manifest of the engine in `directory`, whose gate report says that nothing was measured yet."""
    windows = [window for window in config.sliding_windows if window is not None]
    kv_bytes_per_token = config.kv_elements_per_token * KV_ELEMENT_BYTES[options.kv_cache_dtype]
    return Manifest(
        version=MANIFEST_VERSION,
        model=ModelDimensions(
            architecture=config.architecture,
            vocab_size=config.vocab_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            # What loading the engine checks attention with; layers without a window are checked without.
            sliding_window=max(windows) if len(windows) == config.num_layers else None,
        ),
        block_size=builder.block_size,
        limits=options.limits,
        precision=options.precision,
        kv_cache_dtype=options.kv_cache_dtype,
        runtime=builder.runtime,
        runtime_version=builder.version(),
        inputs=built.inputs,
        outputs=built.outputs,
        kv_bytes_per_block=kv_bytes_per_token * builder.block_size,
        checkpoint_digest=checkpoint_digest,
        files={name: file_digest(directory / name) for name in built.files},
        gate=GateReport(),
        plan=built.plan,
    )
