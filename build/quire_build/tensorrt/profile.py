"""Where the time of a decode step goes, by kind of layer, beside what memory bandwidth allows.

TensorRT times each layer of a step that runs without a CUDA graph. Such a step as a whole is slower than one
by graph, because the host queues its kernels one by one and a measured layer has gaps around it: shares tell
where to look, not how fast a step is.
"""

# mypy: disable-error-code="import-not-found,no-untyped-call"

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.errors import BuildError, CheckpointError
from quire.execution.engine_state import POOL_HEADER_BYTES, STEP_MARK, engine_state_elements
from quire.execution.manifest import Manifest, PlanDetails, read_manifest
from quire.execution.tensorrt.library import tensorrt_module
from quire.execution.tensorrt.shared_memory import allow_shared_memory
from quire.interface import LLM, PLAN_FILE, EnginePlacement
from quire_build.decoder_config import DecoderConfig
from quire_build.repository import VERSION, engine_dir
from quire_build.tensorrt.builder import MODEL_ELEMENT_BYTES
from quire_build.tensorrt.machine import copy_bandwidth_gb_s, this_gpu

KINDS: Mapping[str, str] = {
    "Linear": "linear layers",
    "ProjectQkv": "linear layers",
    "Quantize": "quantising",
    "PagedAttend": "attention",
    "KvWrite": "norm of heads, KV write",
    "Sample": "sampling",
}
"""What the operators are called; layers of any other are the rest."""
REST = "rest"
BATCHES = (1, 32, 256)
CONTEXT = 1024
STEPS, WARM_UP_STEPS = 20, 3


@dataclass(frozen=True)
class StepProfile:
    """A decode step of `batch` sequences with `context` tokens each.

    Attributes:
        batch: sequences.
        context: tokens in the cache of each, the new one included.
        layers_ms: time of each layer by its name; medians over several steps.
        weight_bytes: that the step has to read.
        kv_bytes: that the step has to read.
        bandwidth_gb_s: of copies on this GPU, read and written bytes counted.
    """

    batch: int
    context: int
    layers_ms: Mapping[str, float]
    weight_bytes: int
    kv_bytes: int
    bandwidth_gb_s: float

    @property
    def kinds_ms(self) -> dict[str, float]:
        """Time by kind of layer, the longest first."""
        times: dict[str, float] = defaultdict(float)
        for name, time_ms in self.layers_ms.items():
            times[KINDS.get(name.partition(":")[0], REST)] += time_ms
        return dict(sorted(times.items(), key=lambda item: -item[1]))

    @property
    def total_ms(self) -> float:
        """Of all layers."""
        return sum(self.layers_ms.values())

    @property
    def floor_ms(self) -> float:
        """What reading weights and KV once takes."""
        return (self.weight_bytes + self.kv_bytes) / self.bandwidth_gb_s / 1e6


def profile_repository(
    repository: Path, batches: Sequence[int] = BATCHES, context: int = CONTEXT
) -> Iterator[StepProfile]:
    """Profile decode steps of the plan in a model repository, one for each batch.

    A batch that the engine or the GPU's memory has no room for is left out.

    Raises:
        ManifestError: the repository has no engine.
        BuildError: its engine is no plan, or there is no TensorRT or no GPU, or TensorRT refuses the plan.
    """
    from quire_build.quantization import PLANS

    directory = next(
        (found for placement in EnginePlacement if (found := engine_dir(repository, placement)).is_dir()),
        engine_dir(repository, EnginePlacement.HOSTED),
    )
    manifest = read_manifest(directory)
    if manifest.plan is None:
        raise BuildError(f"the engine in {repository} runs on {manifest.runtime}; only plans are profiled")
    limits = manifest.limits
    if not 1 <= context <= limits.max_model_len:
        raise BuildError(f"the context is {context} tokens; the engine takes 1 to {limits.max_model_len}")
    config_file = repository / LLM / VERSION / "config.json"
    read_bytes = weight_bytes(config_file, 1 if manifest.precision in PLANS else MODEL_ELEMENT_BYTES)
    tensorrt_module()
    this_gpu()
    bandwidth = copy_bandwidth_gb_s()
    plan = _Plan(directory, manifest, manifest.plan)
    token_bytes = manifest.kv_bytes_per_block // manifest.block_size
    for batch in batches:
        if batch > limits.max_num_seqs or not plan.holds(batch, context):
            continue
        layers = plan.decode_layers_ms(batch, context)
        yield StepProfile(batch, context, layers, read_bytes, batch * context * token_bytes, bandwidth)


def weight_bytes(config_file: Path, element_bytes: int) -> int:
    """Bytes of the parameters that every step reads as a whole: all but those of an embedding of its own.

    Raises:
        CheckpointError: the file is no config.json.
    """
    import torch

    from quire_build.decoder import Decoder

    try:
        config = DecoderConfig.from_huggingface(json.loads(config_file.read_bytes()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {config_file}: {error}") from None
    with torch.device("meta"):
        decoder = Decoder(config, 1)
    total = sum(parameter.numel() for parameter in decoder.parameters())
    if not config.tie_word_embeddings:
        total -= config.vocab_size * config.hidden_size
    return total * element_bytes


def report(profile: StepProfile) -> Iterator[str]:
    """The profile as lines of text."""
    yield (
        f"{profile.batch} sequences of {profile.context} tokens: layers take {profile.total_ms:.3f} ms; "
        f"reading {profile.weight_bytes / 1e9:.2f} GB of weights and {profile.kv_bytes / 1e9:.2f} GB of KV "
        f"at {profile.bandwidth_gb_s:.0f} GB/s takes {profile.floor_ms:.3f} ms "
        f"({profile.floor_ms / profile.total_ms:.0%})"
    )
    for kind, time_ms in profile.kinds_ms.items():
        yield f"  {kind:14} {time_ms:9.3f} ms  {time_ms / profile.total_ms:6.1%}"


def medians(steps: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Of each layer over several steps."""
    times: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        for name, time_ms in step.items():
            times[name].append(time_ms)
    return {name: statistics.median(values) for name, values in times.items()}


class _Plan:
    """A plan with torch's memory bound to it, run without graphs and timed by TensorRT."""

    def __init__(self, directory: Path, manifest: Manifest, details: PlanDetails) -> None:
        import torch

        trt = tensorrt_module()
        self._torch, self._trt = torch, trt
        self._manifest, self._details = manifest, details
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine((directory / PLAN_FILE).read_bytes())
        if self._engine is None:
            raise BuildError(
                f"TensorRT {trt.__version__} cannot load {directory / PLAN_FILE}, which is of version "
                f"{manifest.runtime_version}; build it again with `quire build --runtime tensorrt`"
            )
        self._stream = torch.cuda.Stream()
        self._layers: dict[str, float] = {}
        self._profiler = self._profiler_into(self._layers)
        free_bytes, _ = torch.cuda.mem_get_info()
        # Half of it, so that steps have room for what they return.
        self._num_blocks = min(free_bytes // 2 // manifest.kv_bytes_per_block, details.max_blocks)
        state_elements = engine_state_elements(manifest.limits.max_num_seqs)
        state = torch.zeros(state_elements, dtype=torch.int64, device="cuda")
        state[0] = self._num_blocks
        self._bound = {"engine_state": state} | dict(self._pools())

    def holds(self, batch: int, context: int) -> bool:
        """Whether the pool has blocks for such a step."""
        return batch * -(-context // self._manifest.block_size) < self._num_blocks

    def decode_layers_ms(self, batch: int, context: int) -> dict[str, float]:
        """Time of each layer of a step of one token for each sequence."""
        torch = self._torch
        # TensorRT loads a plan's kernels once more for a second set of shapes in one context, and keeps both.
        context_object = self._engine.create_execution_context()
        context_object.profiler = self._profiler
        with (
            torch.cuda.stream(self._stream),
            allow_shared_memory(self._details.kernel_shared_bytes),
        ):
            tensors = self._bound | self._step(batch, context)
            (profile,) = (
                number
                for number, (fewest, most) in enumerate(self._details.profiles)
                if fewest <= batch <= most
            )
            context_object.set_optimization_profile_async(profile, self._stream.cuda_stream)
            for name, tensor in tensors.items():
                if self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT:
                    pool = name.startswith("kv_cache.")
                    context_object.set_input_shape(name, (1,) if pool else tuple(tensor.shape))
                context_object.set_tensor_address(name, tensor.data_ptr())
            steps = []
            for _ in range(WARM_UP_STEPS + STEPS):
                self._layers.clear()
                if not context_object.execute_async_v3(self._stream.cuda_stream):
                    raise BuildError(f"TensorRT cannot run a step of {batch} sequences")
                self._stream.synchronize()
                steps.append(dict(self._layers))
        return medians(steps[WARM_UP_STEPS:])

    def _pools(self) -> Iterator[tuple[str, Any]]:
        """The pool's tensors; random bits would be NaNs, so the KV are small numbers."""
        from quire_build.torch_executor import KV_DTYPES

        torch, details, manifest = self._torch, self._details, self._manifest
        dtype = KV_DTYPES[manifest.kv_cache_dtype]
        for number in range(details.num_pools):
            first = number * details.blocks_per_pool
            blocks = min(details.blocks_per_pool, max(0, self._num_blocks - first))
            header = POOL_HEADER_BYTES if number else 0
            elements = (header + blocks * manifest.kv_bytes_per_block) // dtype.itemsize
            pool = torch.empty(max(elements, 8), dtype=dtype, device="cuda")
            for part in pool.split(1 << 28):
                part.copy_(torch.randn(len(part), dtype=torch.bfloat16, device="cuda"))
            yield f"kv_cache.{number}", pool

    def _step(self, batch: int, context: int) -> dict[str, Any]:
        """Inputs of the last token of `context`, blocks drawn at random, and room for the outputs."""
        torch, size, vocab = self._torch, self._manifest.block_size, self._manifest.model.vocab_size
        width = -(-context // size)
        tables = (torch.randperm(self._num_blocks - 1)[: batch * width] + 1).view(batch, width)
        slots = tables[:, (context - 1) // size] * size + (context - 1) % size
        sampling = torch.zeros(batch, 5)
        sampling[:, 2] = 1.0  # top_p; the inverse temperature of 0 is greedy
        step = {
            "input_ids": torch.randint(vocab, (batch,)),
            "positions": torch.full((batch,), context - 1),
            "slot_mapping": slots,
            "block_tables": tables,
            "query_start_loc": torch.arange(batch + 1),
            "seq_lens": torch.full((batch,), context),
            "logits_indices": torch.arange(batch),
            "step": torch.tensor([1, 1, STEP_MARK, batch, batch]),
        }
        on_gpu = {name: tensor.to("cuda", torch.int32) for name, tensor in step.items()}
        outputs = {
            "logits": torch.empty(batch, vocab, device="cuda"),
            "sampled_ids": torch.empty(batch, dtype=torch.int32, device="cuda"),
            "pool_info": torch.empty(2, dtype=torch.int32, device="cuda"),
            "step_done": torch.empty(1, dtype=torch.int32, device="cuda"),
        }
        return on_gpu | {"sampling": sampling.cuda()} | outputs

    def _profiler_into(self, layers: dict[str, float]) -> Any:
        class Profiler(self._trt.IProfiler):  # type: ignore[misc,name-defined]
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                layers[layer_name] = layers.get(layer_name, 0.0) + ms

        return Profiler()
