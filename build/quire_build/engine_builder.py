"""What the pipeline asks of a runtime: an engine from a checkpoint, and a way to run it for the gate.

There is one builder for each runtime: `openvino_engine` for CPUs, `tensorrt.builder` for NVIDIA's GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quire.execution.executor import Executor
from quire.execution.manifest import EngineLimits, Manifest, PlanDetails, Precision, Runtime
from quire.interface import EnginePlacement
from quire_build.checkpoint import Checkpoint
from quire_build.workload import Workload

Progress = Callable[[str], None]
INSTALL_HINT = "install it with `pip install 'quire[build,cpu]'`"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is built for.

    Attributes:
        precision: of the arithmetic.
        limits: largest steps.
        placement: who will load it.
        gpu_memory_utilization: percent of the GPU's memory that weights, pool and scratch take together; it
            matters where the pool's size is part of the engine.
    """

    precision: Precision
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
        kv_element_bytes: bytes of one element of the pool, by the precisions that there are.
        reference_device: where torch runs the module that the engine is held against.
        default_placement: where its engines run unless the build says otherwise.
    """

    runtime: Runtime
    block_size: int
    kv_element_bytes: Mapping[Precision, int]
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
