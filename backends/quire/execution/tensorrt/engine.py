"""A plan made ready: memory, a pool as large as fits, and a CUDA graph for each size of a padded step.

Every step is one graph, launched on the device's one stream, so that all contexts share their scratch memory
and all steps the buffers on the GPU. No context sees a second set of shapes: for every change TensorRT would
load the plan's kernels once more, without the memory they were allowed, and keep the old ones for good.
"""

from __future__ import annotations

import logging
import secrets
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.errors import EngineStepError, StartupError
from quire.execution.engine_state import NUM_BLOCKS_BYTE, POOL_HEADER_BYTES, engine_state_elements
from quire.execution.executor import PoolInfo
from quire.execution.kv_pool import num_gpu_pool_blocks
from quire.execution.manifest import EngineLimits
from quire.execution.model_inputs import ModelInputs
from quire.execution.padding import step_size
from quire.execution.tensorrt.buffers import (
    SAMPLED_IDS_OFFSET,
    STEP_DONE_OFFSET,
    StepBuffers,
    StepLayout,
)
from quire.execution.tensorrt.device import Device, DeviceError, Graph
from quire.execution.tensorrt.plan import Plan, PlanContext

GRAPH_MARGIN_BYTES = 64 << 20
"""Kept free of the pool for graphs, beside what the largest of them was seen to take for each."""

MAX_UNDER_WAY = 2
"""Steps that may be queued or running at a time."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _StepGraph:
    """A captured step of one size."""

    layout: StepLayout
    context: PlanContext
    """Has what the graph's kernels refer to."""
    graph: Graph


class TensorRTEngine:
    """Runs steps on a plan. Not for use from several threads at once.

    Args:
        plan: what to run; closed with this.
        device: that the plan was loaded on; closed with this.
        limits: what will be asked for at most, within the manifest's.
        kv_cache_bytes: size of the KV pool; 0 takes what `gpu_memory_utilization` leaves.
        gpu_memory_utilization: percent of the GPU's memory that may be in use in the end.

    Raises:
        SettingsError: the pool cannot hold one request of full length.
        StartupError: the GPU failed, or has too little memory.
    """

    def __init__(
        self,
        plan: Plan,
        device: Device,
        limits: EngineLimits,
        *,
        kv_cache_bytes: int = 0,
        gpu_memory_utilization: int = 90,
    ) -> None:
        self.manifest, self.limits, self.device = plan.manifest, limits, device
        self._plan, self._details = plan, plan.details
        self._memory: list[int] = []
        self._pool: list[int] = []
        self._graphs: dict[int, _StepGraph] = {}
        sizes = plan.details.step_sizes
        self.sizes = sizes[: 1 + bisect_left(sizes, limits.max_num_batched_tokens)]
        """Tokens that steps are padded to, ascending."""
        self.max_rows = limits.max_num_seqs
        """Rows of logits in one step, at most."""
        self._blocks_per_seq = -(-limits.max_model_len // plan.manifest.block_size)
        self.pool_info = PoolInfo(0, epoch=1 + secrets.randbelow(2**31 - 1))
        self.buffers: list[StepBuffers] = []
        """For as many steps as may be under way."""
        self.closed = False
        try:
            # Whatever is launched later was launched in here before, as part of a graph.
            with device.allow_shared_memory(plan.details.kernel_shared_bytes):
                self._allocate()
                num_blocks = self._fitting_blocks(kv_cache_bytes, gpu_memory_utilization)
                self._make_pool(num_blocks)
                for size in self.sizes:
                    self._graphs[size] = self._capture(size)
        except (DeviceError, EngineStepError) as error:
            self.close()
            raise StartupError(
                f"the engine cannot be made ready on {device.properties.name}: {error}"
            ) from None
        except StartupError:
            self.close()
            raise
        _log.info(
            "KV cache: %s blocks of %d tokens, %s tokens",
            f"{num_blocks - 1:,}",
            self.manifest.block_size,
            f"{(num_blocks - 1) * self.manifest.block_size:,}",
        )

    def begin(self, inputs: ModelInputs, buffers: StepBuffers, *, wants_logits: bool) -> None:
        """Queue a step that keeps the engine contract, with at most `max_rows` rows of logits.

        Args:
            inputs: of the step; may be changed once this has returned.
            buffers: which no step under way uses. `buffers.done` is done when its outputs are there.
            wants_logits: whether logits [N, vocab_size] are to be copied to `buffers.logits`.

        Raises:
            DeviceError: the step cannot be queued; some of it may have been.
        """
        device, num_rows = self.device, len(inputs.logits_indices)
        sized = self._graphs[step_size(self.sizes, inputs)]
        self._copy_in(sized.layout, inputs, buffers)
        device.launch(sized.graph)
        device.copy_out(buffers.outputs[: SAMPLED_IDS_OFFSET + 4 * num_rows], self._outputs)
        if wants_logits and num_rows:
            device.copy_out(buffers.logits(num_rows, self.manifest.model.vocab_size), self._logits)
        device.record(buffers.done)

    def collect(self, buffers: StepBuffers, step: int, num_rows: int) -> NDArray[np.int32]:
        """The tokens [num_rows] that a step has sampled, until its buffers are used again.

        Raises:
            EngineStepError: the outputs are not those of this step on this pool.
        """
        if buffers.step_done != step:
            raise EngineStepError(f"the engine answered step {buffers.step_done} in place of step {step}")
        expected = self.pool_info.num_blocks, self.pool_info.epoch
        if buffers.pool_info != expected:
            raise EngineStepError(
                f"the engine answered with blocks and epoch {buffers.pool_info} in place of {expected}"
            )
        return buffers.sampled_ids(num_rows)

    def close(self) -> None:
        """Give everything back; nothing may be under way. The device's errors at this are of no interest."""
        self.closed = True
        try:
            for sized in self._graphs.values():
                self.device.free_graph(sized.graph)
            self._graphs.clear()
            for buffers in self.buffers:
                buffers.free()
            for address in (*self._pool, *self._memory):
                self.device.free(address)
            self._plan.close()
            self.device.close()
        except DeviceError as error:
            _log.warning("the GPU did not take everything back: %s", error)

    def _allocate(self) -> None:
        """Everything but the pool, all zeros."""
        largest = self._layout(self.sizes[-1])
        self._state_elements = engine_state_elements(self.manifest.limits.max_num_seqs)
        self._inputs = self._zeros(largest.num_bytes)
        self._tables = self._zeros(4 * self.max_rows * self._blocks_per_seq)
        self._outputs = self._zeros(SAMPLED_IDS_OFFSET + 4 * self.max_rows)
        self._logits = self._zeros(4 * self.max_rows * self.manifest.model.vocab_size)
        self._state = self._zeros(8 * self._state_elements)
        self._scratch = self._zeros(max(1, self._plan.scratch_bytes))
        self.buffers += [StepBuffers(self.device, largest) for _ in range(MAX_UNDER_WAY)]

    def _zeros(self, num_bytes: int) -> int:
        address = self.device.allocate(num_bytes)
        self._memory.append(address)
        self.device.clear(address, num_bytes)
        return address

    def _fitting_blocks(self, kv_cache_bytes: int, utilization_percent: int) -> int:
        """Size of the pool once everything else has what it takes, which is tried out on the null block."""
        self._make_pool(1)
        # What is loaded once for all graphs is there when the second is captured.
        trials = [self._capture(self.sizes[-1])]
        free_bytes = self.device.memory().free
        trials.append(self._capture(self.sizes[-1]))
        graph_bytes = max(0, free_bytes - self.device.memory().free)
        for trial in trials:
            self.device.free_graph(trial.graph)
        trials.clear()
        self._free_pool()
        memory = self.device.memory()
        return num_gpu_pool_blocks(
            self.manifest,
            kv_cache_bytes,
            self.limits.max_model_len,
            total_bytes=memory.total,
            free_bytes=memory.free,
            reserved_bytes=GRAPH_MARGIN_BYTES + len(self.sizes) * graph_bytes,
            utilization_percent=utilization_percent,
            max_blocks=self._details.max_blocks,
        )

    def _make_pool(self, num_blocks: int) -> None:
        """Allocate the pool and tell the plan where it is and how large."""
        details, block_bytes = self._details, self.manifest.kv_bytes_per_block
        for number in range(details.num_pools):
            blocks_here = min(details.blocks_per_pool, max(0, num_blocks - number * details.blocks_per_pool))
            num_bytes = blocks_here * block_bytes + (POOL_HEADER_BYTES if number else 0)
            self._pool.append(self.device.allocate(num_bytes))
            self.device.clear(self._pool[-1], num_bytes)
        self.pool_info = PoolInfo(num_blocks, self.pool_info.epoch)
        size = self.device.pinned(8)
        size.view(np.int64)[0] = num_blocks
        self.device.copy_in(self._state + NUM_BLOCKS_BYTE, size)
        self.device.synchronize()
        self.device.free_pinned(size)

    def _free_pool(self) -> None:
        while self._pool:
            self.device.free(self._pool.pop())

    def _layout(self, size: int) -> StepLayout:
        return StepLayout(size, self.max_rows, self._blocks_per_seq)

    def _context(self, layout: StepLayout) -> PlanContext:
        """A context for steps of this layout, everything bound."""
        context = self._plan.context(self._profile_of(layout.size), self._scratch)
        for name, shape in layout.shapes.items():
            context.set_shape(name, shape)
            context.set_address(name, self._inputs + layout.offsets[name])
        context.set_shape("block_tables", layout.tables_shape)
        context.set_shape("engine_state", (self._state_elements,))
        for name, address in (
            ("engine_state", self._state),
            ("block_tables", self._tables),
            ("pool_info", self._outputs),
            ("step_done", self._outputs + STEP_DONE_OFFSET),
            ("sampled_ids", self._outputs + SAMPLED_IDS_OFFSET),
            ("logits", self._logits),
        ):
            context.set_address(name, address)
        for number, address in enumerate(self._pool):
            context.set_shape(f"kv_cache.{number}", (1,))
            context.set_address(f"kv_cache.{number}", address)
        return context

    def _copy_in(self, layout: StepLayout, inputs: ModelInputs, buffers: StepBuffers) -> None:
        """Queue the copies of a step; its block tables are as wide on the GPU as they can become."""
        staged, tables = buffers.fill(layout, inputs, self.pool_info.epoch)
        self.device.copy_in(self._inputs, staged)
        self.device.copy_rows_in(self._tables, 4 * self._blocks_per_seq, tables)

    def _capture(self, size: int) -> _StepGraph:
        """The graph of steps of a size, run once before, as TensorRT asks for."""
        layout = self._layout(size)
        context = self._context(layout)
        inputs, buffers = self._padding_step(size), self.buffers[0]
        self._copy_in(layout, inputs, buffers)
        context.enqueue()
        self.device.copy_out(buffers.outputs, self._outputs)
        self.device.synchronize()
        self.collect(buffers, inputs.step, len(inputs.logits_indices))
        return _StepGraph(layout, context, self.device.capture(context.enqueue))

    def _profile_of(self, num_tokens: int) -> int:
        return next(
            number
            for number, (fewest, most) in enumerate(self._details.profiles)
            if fewest <= num_tokens <= most
        )

    def _padding_step(self, num_tokens: int) -> ModelInputs:
        """A step on the null block alone, of as many sequences as there can be.

        Has fewer tokens only where all sequences together cannot have as many.
        """
        num_tokens = min(num_tokens, self.limits.max_num_seqs * self.limits.max_model_len)
        num_seqs = min(num_tokens, self.limits.max_num_seqs)
        lengths = np.full(num_seqs, num_tokens // num_seqs, np.int32)
        lengths[: num_tokens % num_seqs] += 1
        starts = np.zeros(num_seqs + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        return ModelInputs(
            step=0,
            input_ids=np.zeros(num_tokens, np.int32),
            positions=np.arange(num_tokens, dtype=np.int32) - np.repeat(starts[:-1], lengths),
            slot_mapping=np.zeros(num_tokens, np.int32),
            block_tables=np.zeros((num_seqs, -(-int(lengths[0]) // self.manifest.block_size)), np.int32),
            query_start_loc=starts,
            seq_lens=lengths,
            logits_indices=starts[1:] - 1,
        )
