"""Plans of realistic shapes with random weights, and what it takes to load them.

A plan is built as `quire build` builds one, but from weights that are made when they are asked for: no
checkpoint is written, and only the plan itself is ever held as a whole.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.execution.manifest import EngineLimits, KvCacheDtype, Precision, write_manifest
from quire.execution.tensorrt.cuda import CudaDevice
from quire.execution.tensorrt.engine import TensorRTEngine
from quire.execution.tensorrt.executor import TensorRTExecutor
from quire.execution.tensorrt.plan import TensorRTPlan
from quire.interface import PLAN_FILE, EnginePlacement
from quire_build.decoder import Decoder
from quire_build.decoder_config import DecoderConfig
from quire_build.engine_builder import KV_ELEMENT_BYTES, EngineOptions, engine_manifest
from quire_build.export import export_graph
from quire_build.quantization import PLANS
from quire_build.rope import cosine_and_sine
from quire_build.tensorrt.builder import TensorRTBuilder, built_plan
from quire_build.tensorrt.plan import PlanOptions, build_plan
from quire_build.torch_executor import KV_DTYPES

LIMITS = EngineLimits(max_num_seqs=1024, max_num_batched_tokens=8192, max_model_len=4096)
DTYPES: dict[Precision, torch.dtype] = {
    precision: KV_DTYPES[own] for precision, (own, *_) in TensorRTBuilder.kv_cache_dtypes.items()
}
"""Of activations and weights that are not quantised."""
STANDARD_DEVIATION = 0.02
BLOCK_SIZE = TensorRTBuilder.block_size


@dataclass(frozen=True)
class Shape:
    """A model's dimensions, as its config.json has them, what it is computed in, and what KV is kept in."""

    config: dict[str, Any]
    precision: Precision
    kv_cache_dtype: KvCacheDtype | None = None
    """None for the precision's own."""

    @property
    def decoder_config(self) -> DecoderConfig:
        """The same, read."""
        return DecoderConfig.from_huggingface(self.config)


LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
SHAPES = {
    "8b": Shape(LLAMA_3_8B, "bf16"),
    "7b": Shape(LLAMA_2_7B, "fp16"),
    "8b int8": Shape(LLAMA_3_8B, "int8"),
    "8b fp8": Shape(LLAMA_3_8B, "fp8"),
    "8b int8-weights": Shape(LLAMA_3_8B, "int8-weights"),
    "8b KV fp8": Shape(LLAMA_3_8B, "bf16", "fp8"),
    "2 layers of 8b": Shape(LLAMA_3_8B | {"num_hidden_layers": 2}, "bf16"),
    "2 layers of 8b int8": Shape(LLAMA_3_8B | {"num_hidden_layers": 2}, "int8"),
}


class RandomWeights:
    """A decoder's tensors by name: normal, seeded by the name, norms around 1, made on the GPU.

    Calling it gives a tensor on the CPU, as a plan builder wants it.
    """

    def __init__(self, config: DecoderConfig, num_positions: int, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            self._shapes = {name: w.shape for name, w in Decoder(config, num_positions).state_dict().items()}
        cosine, sine = cosine_and_sine(config.rope, config.head_dim, num_positions)
        self._tables = {"cosine": cosine, "sine": sine}
        self._dtype = dtype

    def __call__(self, name: str) -> Tensor:
        return self._tables[name] if name in self._tables else self.on_gpu(name).cpu()

    def on_gpu(self, name: str) -> Tensor:
        """A parameter."""
        shape = self._shapes[name]
        generator = torch.Generator("cuda").manual_seed(zlib.crc32(name.encode()))
        values = torch.empty(shape, dtype=self._dtype, device="cuda")
        values.normal_(mean=float(len(shape) == 1), std=STANDARD_DEVIATION, generator=generator)
        return values

    @property
    def num_elements(self) -> int:
        """Elements of all parameters."""
        return sum(shape.numel() for shape in self._shapes.values())

    @property
    def num_read_elements(self) -> int:
        """Elements of the parameters that a step reads as a whole: all but the embedding's."""
        return sum(shape.numel() for name, shape in self._shapes.items() if name != "embed_tokens.weight")


def build_random_plan(
    shape: Shape,
    directory: Path,
    *,
    precision: Precision | None = None,
    limits: EngineLimits = LIMITS,
    pool_bytes: int = 0,
) -> dict[str, float]:
    """Leave model.plan and engine.json in `directory`.

    Returns:
        Seconds that each part took, by its name.
    """
    config, precision = shape.decoder_config, precision or shape.precision
    seconds: dict[str, float] = {}
    began = time.perf_counter()

    def note(name: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[name] = round(now - began, 2)
        began = now

    directory.mkdir(parents=True, exist_ok=True)
    graph = export_graph(config, BLOCK_SIZE, limits.max_model_len)
    note("export_s")
    dtype = DTYPES[precision]
    kv_cache_dtype = shape.kv_cache_dtype or TensorRTBuilder.kv_cache_dtypes[precision][0]
    options = PlanOptions(
        dtype=dtype,
        kv_dtype=KV_DTYPES[kv_cache_dtype],
        limits=limits,
        block_size=BLOCK_SIZE,
        kv_bytes_per_block=config.kv_elements_per_token * BLOCK_SIZE * KV_ELEMENT_BYTES[kv_cache_dtype],
        pool_bytes=pool_bytes,
        quantization=PLANS.get(precision),
    )
    weights = RandomWeights(config, limits.max_model_len, dtype)
    plan = build_plan(graph, weights, options, lambda line: print(line, flush=True))
    note("build_s")
    (directory / PLAN_FILE).write_bytes(plan.data)
    note("write_s")
    manifest = engine_manifest(
        config,
        TensorRTBuilder(),
        EngineOptions(
            precision, kv_cache_dtype, limits, EnginePlacement.IN_PROCESS, gpu_memory_utilization=90
        ),
        built_plan(plan.details),
        directory,
        checkpoint_digest="random weights",
    )
    write_manifest(manifest, directory)
    note("digest_s")
    return seconds


@dataclass(frozen=True)
class LoadedPlan:
    """A plan ready to run, and seconds that getting there took."""

    engine: TensorRTEngine
    executor: TensorRTExecutor
    seconds: dict[str, float]


def load(
    directory: Path,
    *,
    limits: EngineLimits | None = None,
    kv_cache_bytes: int = 0,
    return_logits: bool = False,
) -> LoadedPlan:
    """Load a plan as a server does, timed: what it takes to read it, and to make pool and graphs."""
    torch.cuda.empty_cache()
    began = time.perf_counter()
    device = CudaDevice()
    plan = TensorRTPlan(directory, device)
    read = time.perf_counter()
    engine = TensorRTEngine(plan, device, limits or plan.manifest.limits, kv_cache_bytes=kv_cache_bytes)
    ready = time.perf_counter()
    seconds = {
        "digest_and_deserialize_s": round(read - began, 2),
        "pool_and_graphs_s": round(ready - read, 2),
        "cold_start_s": round(ready - began, 2),
    }
    return LoadedPlan(engine, TensorRTExecutor(engine, return_logits=return_logits), seconds)
