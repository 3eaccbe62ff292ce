"""Where a step's tensors lie, in pinned memory and on the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.execution.engine_state import STEP_MARK
from quire.execution.model_inputs import NUM_SAMPLING_COLUMNS, ModelInputs
from quire.execution.padding import pad_into
from quire.execution.tensorrt.device import ALIGNMENT, Device

STEP_DONE_OFFSET = ALIGNMENT
SAMPLED_IDS_OFFSET = 2 * ALIGNMENT
"""In a step's outputs, which begin with pool_info."""


class StepLayout:
    """The inputs of T tokens, S sequences and N rows of logits, one after another, but for the block tables.

    They are brought to the GPU by one copy. A layout with fewer of everything takes no more bytes.
    """

    def __init__(self, num_tokens: int, num_seqs: int, num_rows: int) -> None:
        self.num_tokens, self.num_seqs, self.num_rows = num_tokens, num_seqs, num_rows
        self.shapes: dict[str, tuple[int, ...]] = {
            "step": (5,),
            "input_ids": (num_tokens,),
            "positions": (num_tokens,),
            "slot_mapping": (num_tokens,),
            "query_start_loc": (num_seqs + 1,),
            "seq_lens": (num_seqs,),
            "logits_indices": (num_rows,),
            "sampling": (num_rows, NUM_SAMPLING_COLUMNS),
        }
        self.offsets: dict[str, int] = {}
        end = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = end
            end += -(-4 * shape[0] * (shape[1] if len(shape) > 1 else 1) // ALIGNMENT) * ALIGNMENT
        self.num_bytes = end

    def views(self, memory: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """The inputs in `memory`."""
        return {
            name: np.ndarray(
                shape, np.float32 if name == "sampling" else np.int32, memory, self.offsets[name]
            )
            for name, shape in self.shapes.items()
        }


class StepBuffers:
    """Pinned memory of one step under way: its inputs until it has run, its outputs until they are used.

    Args:
        device: that copies from and to it.
        largest: layout of the largest step.
        max_blocks_per_seq: columns of a block table, at most.
    """

    def __init__(self, device: Device, largest: StepLayout, max_blocks_per_seq: int) -> None:
        self._device = device
        self._inputs = device.pinned(largest.num_bytes)
        self._tables = device.pinned(4 * largest.num_seqs * max_blocks_per_seq)
        self._logits: NDArray[np.uint8] | None = None
        self.outputs = device.pinned(SAMPLED_IDS_OFFSET + 4 * largest.num_rows)
        """pool_info, step_done and sampled_ids."""
        self.done = device.event()
        outputs: NDArray[np.int32] = self.outputs.view(np.int32)
        self._pool_info = outputs[:2]
        self._step_done = outputs[STEP_DONE_OFFSET // 4 :][:1]
        self._sampled_ids = outputs[SAMPLED_IDS_OFFSET // 4 :]

    def fill(
        self, layout: StepLayout, inputs: ModelInputs, epoch: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Write a step, padded to the layout.

        Returns:
            What to copy: the inputs as `layout` has them, and the block tables of the step alone, [S, B].
        """
        views = layout.views(self._inputs)
        sizes = len(inputs.input_ids), len(inputs.logits_indices)
        views.pop("step")[:] = inputs.step, epoch, STEP_MARK, *sizes
        tables: NDArray[np.int32] = np.ndarray(inputs.block_tables.shape, np.int32, self._tables)
        pad_into(inputs, ModelInputs(step=inputs.step, block_tables=tables, **views))
        return self._inputs[: layout.num_bytes], tables

    def logits(self, num_rows: int, vocab_size: int) -> NDArray[np.float32]:
        """Memory for logits [num_rows, vocab_size]; most steps have none."""
        num_bytes = 4 * num_rows * vocab_size
        if self._logits is None or len(self._logits) < num_bytes:
            if self._logits is not None:
                self._device.free_pinned(self._logits)
            self._logits = self._device.pinned(num_bytes)
        return np.ndarray((num_rows, vocab_size), np.float32, self._logits)

    @property
    def pool_info(self) -> tuple[int, int]:
        """Number of blocks and epoch, as the plan returned them."""
        num_blocks, epoch = self._pool_info.tolist()
        return num_blocks, epoch

    @property
    def step_done(self) -> int:
        """Number of the step that the plan has run."""
        return int(self._step_done[0])

    def sampled_ids(self, num_rows: int) -> NDArray[np.int32]:
        """[num_rows] tokens, until the buffers are filled again."""
        return self._sampled_ids[:num_rows]

    def free(self) -> None:
        """Give the memory back."""
        for memory in (self._inputs, self._tables, self.outputs, self._logits):
            if memory is not None:
                self._device.free_pinned(memory)
