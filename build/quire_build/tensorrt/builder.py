"""Engines for NVIDIA's GPUs: a plan with its weights, built by TensorRT on the GPU that it is for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from quire.errors import BuildError
from quire.execution.executor import Executor
from quire.execution.manifest import KvCacheDtype, Manifest, PlanDetails, Precision, Runtime
from quire.execution.tensorrt.library import tensorrt_module
from quire.interface import PLAN_FILE, PLAN_INPUTS, PLAN_OUTPUTS, POOL_INPUT_PREFIX, EnginePlacement
from quire.user_cache import user_cache
from quire_build.checkpoint import Checkpoint, checkpoint_weights
from quire_build.engine_builder import KV_ELEMENT_BYTES, BuiltEngine, EngineOptions, Progress
from quire_build.tensorrt.machine import this_gpu
from quire_build.workload import Workload

if TYPE_CHECKING:
    import onnx

    from quire_build.decoder_config import DecoderConfig
    from quire_build.quantization import Quantization

MODEL_ELEMENT_BYTES = 2
"""Of activations, and of weights that are not of eight bits, in every precision."""
TIMING_CACHE_FILE = "tensorrt-timing-cache"
"""Name of the folder's files before the dot; see `timing_cache_file`."""


class TensorRTBuilder:
    """Builds what `quire.execution.tensorrt` and Triton's TensorRT backend run."""

    runtime: Runtime = "tensorrt"
    block_size = 16
    kv_cache_dtypes: Mapping[Precision, tuple[KvCacheDtype, ...]] = {
        "bf16": ("bf16", "fp8"),
        "fp16": ("fp16", "fp8"),
        "int8": ("bf16", "fp8"),
        "fp8": ("bf16", "fp8"),
        "int8-weights": ("bf16", "fp8"),
        "fp8-weights": ("bf16", "fp8"),
    }
    reference_device = "cuda"
    default_placement = EnginePlacement.IN_PROCESS

    def version(self) -> str:
        """TensorRT's version."""
        return str(tensorrt_module().__version__)

    def target(self) -> str:
        """The GPU's name."""
        return this_gpu().name

    def build(
        self, source: Checkpoint, options: EngineOptions, directory: Path, progress: Progress
    ) -> BuiltEngine:
        """Lower the graph and build it; weights are read from the checkpoint as they are needed."""
        from quire_build.export import export_graph
        from quire_build.quantization import PLANS
        from quire_build.tensorrt.plan import PlanOptions, build_plan
        from quire_build.torch_executor import KV_DTYPES

        config, limits = source.config, options.limits
        progress(f"exporting the graph of {source.directory} ({config.architecture})")
        graph = export_graph(config, self.block_size, limits.max_model_len)
        kv_element_bytes = KV_ELEMENT_BYTES[options.kv_cache_dtype]
        quantization = PLANS.get(options.precision)
        plan_options = PlanOptions(
            dtype=KV_DTYPES[self.kv_cache_dtypes[options.precision][0]],
            kv_dtype=KV_DTYPES[options.kv_cache_dtype],
            limits=limits,
            block_size=self.block_size,
            kv_bytes_per_block=config.kv_elements_per_token * self.block_size * kv_element_bytes,
            pool_bytes=self._hosted_pool_bytes(
                options, config, weight_bytes(graph, MODEL_ELEMENT_BYTES, quantization)
            ),
            quantization=quantization,
            timing_cache=user_cache() / timing_cache_file(options.precision, options.placement),
        )
        weight = checkpoint_weights(source, limits.max_model_len)
        plan = build_plan(graph, weight, plan_options, progress)
        (directory / PLAN_FILE).write_bytes(plan.data)
        return built_plan(plan.details)

    def executor(self, directory: Path, manifest: Manifest, workload: Workload) -> Executor:
        """The plan with a pool that is made for the workload."""
        from quire.execution.tensorrt import load_plan

        return load_plan(
            directory,
            kv_cache_bytes=workload.num_blocks * manifest.kv_bytes_per_block,
            limits=msgspec.structs.replace(manifest.limits, max_model_len=workload.max_sequence_len),
            return_logits=True,
        )

    def _hosted_pool_bytes(self, options: EngineOptions, config: DecoderConfig, weight_bytes: int) -> int:
        """Size of the pool that Triton will allocate with the plan; 0 where the scheduler's process does.

        Raises:
            BuildError: weights and activations leave nothing.
        """
        from quire_build.tensorrt.hosted_memory import host_reserve_bytes

        if options.placement is not EnginePlacement.HOSTED:
            return 0
        allowed = this_gpu().memory_bytes * options.gpu_memory_utilization // 100
        reserve = host_reserve_bytes(config, options.limits, MODEL_ELEMENT_BYTES)
        pool_bytes = allowed - weight_bytes - reserve
        if pool_bytes <= 0:
            raise BuildError(
                f"{options.gpu_memory_utilization}% of the GPU's memory are {allowed} bytes, but the weights "
                f"take {weight_bytes} and {reserve} are kept for activations and the server: nothing is left "
                "for the KV pool; a smaller --max-num-batched-tokens needs less"
            )
        return pool_bytes


def built_plan(details: PlanDetails) -> BuiltEngine:
    """What an engine's directory holds once its plan has been written."""
    pools = (f"{POOL_INPUT_PREFIX}{i}" for i in range(details.num_pools))
    return BuiltEngine(
        files=(PLAN_FILE,),
        inputs=(*(tensor.name for tensor in PLAN_INPUTS), *pools),
        outputs=tuple(tensor.name for tensor in PLAN_OUTPUTS),
        plan=details,
    )


def weight_bytes(model: onnx.ModelProto, element_bytes: int, quantization: Quantization | None) -> int:
    """Bytes of a plan's weights.

    Args:
        model: model.onnx, not lowered yet.
        element_bytes: of weights that stay in the model's type.
        quantization: of linear layers; None for none.
    """
    # It needs torch, which an unchanged build does not start.
    from quire_build.tensorrt.pairs import paired_columns

    linear = {node.input[1] for node in model.graph.node if node.op_type == "Gemm"}
    others = {name for node in model.graph.node for name in node.input if node.op_type != "Gemm"}
    total = 0
    for weight in model.graph.initializer:
        elements = math.prod(weight.dims)
        narrow = quantization is not None and weight.name in linear
        if quantization is not None and narrow:
            rows, columns = weight.dims
            total += rows * (columns if quantization.inputs else paired_columns(columns))
            total += rows * -(-columns // quantization.group(columns)) * element_bytes
        # An embedding that is the output layer as well is there twice.
        if not narrow or weight.name in others:
            total += elements * element_bytes
    return total


def timing_cache_file(precision: Precision, placement: EnginePlacement) -> str:
    """Name of the file with what TensorRT measured for plans of this kind, by this version of the kernels.

    TensorRT knows a tactic by its number and the shapes it was timed with, not by the kernel behind the
    number, nor by the weight's element type.
    """
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    return f"{TIMING_CACHE_FILE}.{precision}.{placement.value}.{digest}"
