"""Where a step's tensors lie, in pinned memory and on the GPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.execution.model_inputs import ModelInputs
from quire.execution.padding import pad_into, sized_shapes, step_row
from quire.execution.tensorrt.device import ALIGNMENT, Device

STEP_DONE_OFFSET = ALIGNMENT
SAMPLED_IDS_OFFSET = 2 * ALIGNMENT
"""In a step's outputs, which begin with pool_info."""


class StepLayout:
    """The inputs of steps of one size, one after another, but for the block tables.

    They are brought to the GPU by one copy. The layout of a smaller size takes no more bytes.

    Args:
        size: in tokens.
        max_num_seqs: sequences in any step, at most.
        table_width: blocks of a sequence, at most.
    """

    def __init__(self, size: int, max_num_seqs: int, table_width: int) -> None:
        self.size = size
        self.shapes = sized_shapes(size, max_num_seqs, table_width)
        self.tables_shape = self.shapes.pop("block_tables")
        self.offsets: dict[str, int] = {}
        end = 0
        for name, shape in self.shapes.items():
            self.offsets[name] = end
            end += -(-4 * math.prod(shape) // ALIGNMENT) * ALIGNMENT
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
    """

    def __init__(self, device: Device, largest: StepLayout) -> None:
        self._device = device
        self._inputs = device.pinned(largest.num_bytes)
        num_seqs, table_width = largest.tables_shape
        self._tables = device.pinned(4 * num_seqs * table_width)
        self._logits: NDArray[np.uint8] | None = None
        self.outputs = device.pinned(SAMPLED_IDS_OFFSET + 4 * num_seqs)
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
        views.pop("step")[:] = step_row(inputs, epoch)
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
