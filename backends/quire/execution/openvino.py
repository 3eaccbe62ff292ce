"""The CPU engine: model.onnx on OpenVINO, with a KV pool of its own.

`OpenVINOEngine` loads an engine directory, owns the pool and runs steps; `OpenVINOExecutor` puts one behind
the `Executor` protocol, in process. Needs nothing but openvino and numpy.
"""

from __future__ import annotations

import functools
import logging
import mmap
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from quire.errors import EngineStepError, ManifestError
from quire.execution.executor import PoolInfo, StepOutput
from quire.execution.kv_pool import num_pool_blocks
from quire.execution.machine import available_cores
from quire.execution.manifest import EngineLimits, Manifest, read_manifest, verify_files
from quire.execution.model_inputs import InputsCheck, ModelInputs
from quire.execution.openvino_attention import (
    BLOCK_SIZE,
    OPENVINO_VERSION,
    check_attention,
    conversion_extension,
)
from quire.interface import STEP_INPUTS

GRAPH_FILE = "model.onnx"
WARM_UP_SECONDS = 2.0

_CAPABILITIES = ("CPU", "OPTIMIZATION_CAPABILITIES")
_PRECISIONS = {"float32": "f32", "bf16": "bf16"}
_LOG = logging.getLogger(__name__)


class OpenVINOEngine:
    """A loaded engine. Runs one step at a time; not for use from several threads at once.

    Args:
        engine_dir: holds model.onnx and engine.json.
        kv_cache_bytes: size of the KV pool; 0 takes a share of the free memory, with a cap.
        threads: of the inference; 0 takes the cores that this process may use.
        limits: what this engine will be asked for at most; None takes the manifest's.
        warm_up_s: seconds to spend on running common shapes once.

    Raises:
        ManifestError: engine.json or a file is damaged, or is for another runtime or version.
        SettingsError: the pool cannot hold one request of full length.
        StartupError: the installed OpenVINO does not compute paged attention as it should.
    """

    def __init__(
        self,
        engine_dir: Path,
        *,
        kv_cache_bytes: int = 0,
        threads: int = 0,
        limits: EngineLimits | None = None,
        warm_up_s: float = WARM_UP_SECONDS,
    ) -> None:
        self.manifest = read_manifest(engine_dir)
        self.limits = limits or self.manifest.limits
        _check_fit(self.manifest, engine_dir)
        verify_files(self.manifest, engine_dir)
        num_blocks = num_pool_blocks(self.manifest, kv_cache_bytes, self.limits.max_model_len)
        self.pool_info = PoolInfo(num_blocks, epoch=1 + secrets.randbelow(2**31 - 1))

        core = _core()
        if self.manifest.precision == "bf16" and "BF16" not in core.get_property(*_CAPABILITIES):
            raise ManifestError(
                "the engine computes in bf16, which this CPU does not; "
                "build it again with `quire build --precision float32`"
            )
        properties = _properties(self.manifest, threads or available_cores())
        check_attention(core, properties, self.manifest.model, self.manifest.precision)
        compiled = core.compile_model(_read_graph(engine_dir / GRAPH_FILE), "CPU", properties)
        self._request = compiled.create_infer_request()
        self._pool = self._bind_pool(compiled, num_blocks)
        self._check = InputsCheck(self.manifest.model.vocab_size, BLOCK_SIZE, num_blocks, self.limits)
        self._bound: list[ov.Tensor] = []
        _LOG.info(
            "%s in %s on %d threads; KV pool of %d blocks, %d tokens, %.0f MiB",
            self.manifest.model.architecture,
            self.manifest.precision,
            threads or available_cores(),
            num_blocks - 1,
            (num_blocks - 1) * BLOCK_SIZE,
            num_blocks * self.manifest.kv_bytes_per_block / 2**20,
        )
        self._warm_up(warm_up_s)

    def run(self, inputs: ModelInputs) -> NDArray[np.float32]:
        """Compute one step.

        Returns:
            Logits [N, vocab_size], in memory that the next step overwrites.

        Raises:
            EngineStepError: the inputs break the engine contract, or OpenVINO failed.
        """
        self.start(inputs)
        return self.wait()

    def start(self, inputs: ModelInputs) -> None:
        """Begin one step; its inputs must stay unchanged until `wait` has returned.

        Raises:
            EngineStepError: as `run`, or the step before is still being computed.
        """
        self._check(inputs)
        try:
            # The arrays are not copied, so something has to keep the tensors over them alive.
            bound = [ov.Tensor(getattr(inputs, spec.name), shared_memory=True) for spec in STEP_INPUTS]
            for spec, tensor in zip(STEP_INPUTS, bound, strict=True):
                self._request.set_tensor(spec.name, tensor)
            self._bound = bound
            self._request.start_async()
        except RuntimeError as error:
            raise EngineStepError(f"OpenVINO cannot begin step {inputs.step}: {error}") from error

    def wait(self, timeout_s: float | None = None) -> NDArray[np.float32]:
        """Wait for the step begun last, and return what `run` returns.

        Raises:
            EngineStepError: OpenVINO failed, or `timeout_s` passed.
        """
        try:
            if timeout_s is None:
                self._request.wait()
            elif not self._request.wait_for(int(timeout_s * 1000)):
                raise EngineStepError(f"the step has not come back after {timeout_s} s")
            logits: NDArray[np.float32] = self._request.get_output_tensor(0).data
        except RuntimeError as error:
            raise EngineStepError(f"OpenVINO failed a step: {error}") from error
        return logits

    def cancel(self) -> None:
        """Interrupt the step under way, if there is one; may be called from another thread."""
        self._request.cancel()

    def _bind_pool(self, compiled: ov.CompiledModel, num_blocks: int) -> list[ov.Tensor]:
        """Allocate the pool as the compiled model wants it and check that every input is accounted for."""
        pool = []
        for port in compiled.inputs:
            name = port.get_any_name()
            if name.startswith(("key_cache.", "value_cache.")):
                block_shape = [port.get_partial_shape()[axis].get_length() for axis in (1, 2, 3)]
                pool.append(_zeros([num_blocks, *block_shape], port.get_element_type()))
                self._request.set_tensor(name, pool[-1])
        names = {port.get_any_name() for port in compiled.inputs}
        missing = {spec.name for spec in STEP_INPUTS} - names
        if missing or len(names) != len(STEP_INPUTS) + 2 * self.manifest.model.num_layers:
            raise ManifestError(
                f"{GRAPH_FILE} has the inputs {', '.join(sorted(names))}, which are not those of the engine "
                f"contract for {self.manifest.model.num_layers} layers; build it again with `quire build`"
            )
        block_bytes = sum(tensor.get_byte_size() for tensor in pool) // num_blocks
        if block_bytes != self.manifest.kv_bytes_per_block:
            raise ManifestError(
                f"kv_bytes_per_block is {self.manifest.kv_bytes_per_block} in engine.json, but OpenVINO "
                f"keeps {block_bytes} bytes per block on this machine; build it again with `quire build`"
            )
        return pool

    def _warm_up(self, budget_s: float) -> None:
        """Run common shapes once, because the first step of each takes OpenVINO several times as long."""
        began = time.perf_counter()
        done, last_s, last_size = 0, 0.0, 1
        for size in _warm_up_sizes(self.limits):
            elapsed = time.perf_counter() - began
            if elapsed + last_s * max(1.0, size / last_size) > budget_s:
                break
            self.run(self._padding(size))
            done, last_size = done + 1, size
            last_s = time.perf_counter() - began - elapsed
        _LOG.info("warmed up %d shapes in %.1f s", done, time.perf_counter() - began)

    def _padding(self, num_tokens: int) -> ModelInputs:
        """A step on the null block alone: decoding sequences or, where those do not suffice, prompts."""
        length = 1 if num_tokens <= self.limits.max_num_seqs else min(num_tokens, self.limits.max_model_len)
        starts = np.append(np.arange(0, num_tokens, length), num_tokens).astype(np.int32)
        positions = (np.arange(num_tokens) % length).astype(np.int32)
        lengths = np.diff(starts)
        return ModelInputs(
            step=0,
            input_ids=np.zeros(num_tokens, np.int32),
            positions=positions,
            slot_mapping=positions % BLOCK_SIZE,
            block_tables=np.zeros((len(lengths), -(-length // BLOCK_SIZE)), np.int32),
            query_start_loc=starts,
            seq_lens=lengths,
            logits_indices=starts[1:] - 1,
        )


def _check_fit(manifest: Manifest, engine_dir: Path) -> None:
    """Refuse an engine that was built for something else than this module.

    Raises:
        ManifestError: naming what differs.
    """
    for name, actual, expected in (
        ("runtime", manifest.runtime, "openvino"),
        ("runtime_version", manifest.runtime_version, OPENVINO_VERSION),
        ("block_size", manifest.block_size, BLOCK_SIZE),
        ("inputs", list(manifest.inputs), [spec.name for spec in STEP_INPUTS]),
    ):
        if actual != expected:
            raise ManifestError(
                f"{engine_dir / 'engine.json'} has {name} {actual}, this Quire's CPU engine needs "
                f"{expected}; build the engine again with `quire build`"
            )


def _properties(manifest: Manifest, threads: int) -> dict[str, object]:
    """How OpenVINO compiles: its defaults would be bf16 and an 8-bit KV cache on some CPUs."""
    precision = _PRECISIONS[manifest.precision]
    return {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        # Pinned threads of two processes end up on the same cores.
        "ENABLE_CPU_PINNING": False,
    }


@functools.cache
def _core() -> ov.Core:
    """The one core of this process whose CPU plugin is loaded, for as long as the process lives.

    That plugin gives the thread that loads it another stack for signals, and takes it away in the end. Where
    several do not end in the reverse order, the thread keeps one that is gone, and the next signal with a
    handler, Ctrl-C for instance, kills the process (OpenVINO 2026.4).
    """
    return ov.Core()


def _read_graph(path: Path) -> ov.Model:
    """The ONNX graph with logits as its only output: the caches are written in place.

    Raises:
        ManifestError: OpenVINO cannot read the file.
    """
    core = ov.Core()  # of its own, since the extension serves one model; reading loads no plugin
    core.add_extension(conversion_extension())
    try:
        graph = core.read_model(path)
    except RuntimeError as error:
        raise ManifestError(
            f"OpenVINO cannot read {path} ({error}); build the engine again with `quire build`"
        ) from error
    for parameter in graph.get_parameters():
        parameter.output(0).get_tensor().set_names({parameter.get_friendly_name()})
    logits = next(result for result in graph.get_results() if "logits" in result.input_value(0).get_names())
    return ov.Model([logits], graph.get_parameters(), "decoder")


def _zeros(shape: list[int], element_type: ov.Type) -> ov.Tensor:
    """A tensor of zeros that takes memory only where it has been written to."""
    num_bytes = int(np.prod(shape)) * element_type.size
    memory = np.frombuffer(mmap.mmap(-1, num_bytes), dtype=np.uint8)
    return ov.Tensor(memory, ov.Shape(shape), element_type)


def _warm_up_sizes(limits: EngineLimits) -> Iterator[int]:
    """Tokens per step, the more useful first: powers of two, then every number of decoding sequences."""
    powers = [2**exponent for exponent in range(limits.max_num_batched_tokens.bit_length())]
    yield from (size for size in powers if size <= limits.max_num_batched_tokens)
    yield from (size for size in range(1, limits.max_num_seqs + 1) if size not in powers)


class OpenVINOExecutor:
    """Runs steps on an engine in this process, one at a time."""

    max_in_flight = 1
    token_feedback = False

    def __init__(self, engine: OpenVINOEngine) -> None:
        self._engine = engine

    def pool_info(self, timeout_s: float) -> PoolInfo:
        """The engine's pool; a loaded engine answers at once."""
        return self._engine.pool_info

    def submit(self, inputs: ModelInputs) -> OpenVINOStep:
        """Start a step on OpenVINO's threads."""
        self._engine.start(inputs)
        return OpenVINOStep(self._engine)

    def close(self) -> None:
        """Interrupt the step under way, so that who waits for it need not wait any longer."""
        self._engine.cancel()


class OpenVINOStep:
    """A step under way."""

    def __init__(self, engine: OpenVINOEngine) -> None:
        self._engine = engine

    def result(self, timeout_s: float) -> StepOutput:
        """Wait for the step; the logits stay valid until the next one is submitted."""
        return StepOutput(self._engine.wait(timeout_s), None, self._engine.pool_info)
