"""From the scheduler's decisions to one step's tensors.

The batch keeps a row for every running request: its block table, its sampling parameters and the token
sampled for it last. A step's tensors are gathered from the rows; only what the step changed is touched one
request at a time. In the overlapped loop a step is prepared before the tokens of the step before are
known: their places hold a mark, until `patch` or an engine with token feedback fills them in.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.execution.model_inputs import NUM_SAMPLING_COLUMNS, ModelInputs
from quire.execution.sampler import SMALLEST_TEMPERATURE, SamplingBatch
from quire.scheduling.request import Request
from quire.scheduling.scheduler_output import SchedulerOutput

LAST_STEP_NUMBER = 2**31 - 1
"""Step numbers travel as int32; the one after this is 0."""


@dataclass(slots=True)
class PreparedStep:
    """One step, ready for an executor and then for the sampler."""

    inputs: ModelInputs
    sampling: SamplingBatch
    """Of the N requests that sample a token in this step."""
    sampling_rows: NDArray[np.intp]
    """[N] rows of the batch that those requests stood in."""


def patch(inputs: ModelInputs, token_ids: NDArray[np.int32]) -> None:
    """Fill in the ids that were unknown when the step was prepared.

    Args:
        inputs: whose `input_ids` hold -(r + 1) where the token belongs that the step before sampled from
            row r of its logits.
        token_ids: [N] tokens that the step before sampled.
    """
    unknown = np.flatnonzero(inputs.input_ids < 0)
    inputs.input_ids[unknown] = token_ids[-1 - inputs.input_ids[unknown]]


class InputBatch:
    """The running requests as rows of arrays.

    Args:
        max_num_seqs: rows.
        max_num_batched_tokens: tokens in one step.
        max_model_len: tokens in one sequence.
        block_size: tokens in one block of the KV pool.
        sampled_by_engine: whether the steps are for an executor that samples itself, by their `sampling`.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        block_size: int,
        *,
        sampled_by_engine: bool = False,
    ) -> None:
        self.block_size = block_size
        self._sampled_by_engine = sampled_by_engine
        max_blocks = -(-max_model_len // block_size)
        self._row_of: dict[str, int] = {}
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._step = 0

        self._block_tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._num_blocks = [0] * max_num_seqs
        self._num_prompt_tokens = np.zeros(max_num_seqs, dtype=np.int64)
        self._sampling = SamplingBatch(
            inverse_temperature=np.zeros(max_num_seqs, dtype=np.float32),
            top_k=np.zeros(max_num_seqs, dtype=np.int64),
            top_p=np.zeros(max_num_seqs, dtype=np.float32),
            min_p=np.zeros(max_num_seqs, dtype=np.float32),
            seed=np.zeros(max_num_seqs, dtype=np.uint64),
            output_index=np.zeros(max_num_seqs, dtype=np.int64),
        )
        # The token sampled last in each row, or its mark, and the position it stands at; -1 if there is none.
        self._last_token = np.zeros(max_num_seqs, dtype=np.int32)
        self._last_position = np.full(max_num_seqs, -1, dtype=np.int64)
        self._last_sampling_step = np.full(max_num_seqs, -1, dtype=np.int64)

        # Two sets in turn, whichever way the loop goes: when a step is prepared, the one before may be under
        # way, but the one before that has been collected.
        self._buffers = [_Buffers(max_num_seqs, max_num_batched_tokens, max_blocks) for _ in range(2)]
        self._count = np.arange(max(max_num_batched_tokens, max_num_seqs), dtype=np.int32)

    def update_rows(self, scheduled: SchedulerOutput) -> None:
        """Follow requests that came, went or got blocks, for every output, even one that computes nothing."""
        for request_id in scheduled.finished_request_ids:
            self._release(request_id)
        for request in scheduled.preempted_requests:
            self._release(request.request_id)
        for request in scheduled.new_requests:
            self._occupy(request)
        for request in scheduled.resumed_requests:
            self._occupy(request)
        for request_id, block_ids in scheduled.new_block_ids.items():
            row = self._row_of[request_id]
            start = self._num_blocks[row]
            end = start + len(block_ids)
            self._block_tables[row, start:end] = block_ids
            self._num_blocks[row] = end

    def prepare(self, scheduled: SchedulerOutput) -> PreparedStep:
        """Pack a step's tensors, in buffers that the next but one reuses; the rows have been updated."""
        row_of = self._row_of
        rows = np.array([row_of[request.request_id] for request in scheduled.requests], dtype=np.intp)
        num_computed = np.array(scheduled.num_computed_tokens, dtype=np.int32)
        num_scheduled = np.array(scheduled.num_scheduled_tokens, dtype=np.int32)
        sampling = np.array(scheduled.sampling, dtype=np.intp)

        inputs = self._pack(rows, num_computed, num_scheduled, sampling)
        self._fill_token_ids(inputs, scheduled, rows, num_computed, num_scheduled)
        sampling_rows, sampled_positions = rows[sampling], inputs.seq_lens[sampling]
        self._mark_sampled(sampling_rows, sampled_positions)
        parameters = self._sampling.rows(sampling_rows)
        parameters.output_index = sampled_positions - self._num_prompt_tokens[sampling_rows]
        if self._sampled_by_engine:
            inputs.sampling = self._buffers[0].sampling[: len(sampling)]
            parameters.pack(inputs.sampling)
        return PreparedStep(inputs, parameters, sampling_rows)

    def record(self, step: PreparedStep, token_ids: NDArray[np.int32]) -> None:
        """Put the tokens [N] that a step sampled in place of their marks in the rows."""
        current = self._last_sampling_step[step.sampling_rows] == step.inputs.step
        self._last_token[step.sampling_rows[current]] = token_ids[current]

    def _occupy(self, request: Request) -> None:
        """Give a request a row, with an empty block table."""
        row = self._row_of[request.request_id] = self._free_rows.pop()
        self._block_tables[row] = 0
        self._num_blocks[row] = 0
        self._num_prompt_tokens[row] = request.num_prompt_tokens
        self._last_position[row] = -1
        parameters, columns = request.sampling_params, self._sampling
        columns.inverse_temperature[row] = (
            0.0 if parameters.greedy else 1 / max(parameters.temperature, SMALLEST_TEMPERATURE)
        )
        columns.top_k[row] = parameters.top_k
        columns.top_p[row] = parameters.top_p
        columns.min_p[row] = parameters.min_p
        columns.seed[row] = parameters.seed

    def _release(self, request_id: str) -> None:
        """Take a request's row back, if it has one: one that ended while it waited has none."""
        row = self._row_of.pop(request_id, None)
        if row is not None:
            self._free_rows.append(row)

    def _pack(
        self,
        rows: NDArray[np.intp],
        num_computed: NDArray[np.int32],
        num_scheduled: NDArray[np.int32],
        sampling: NDArray[np.intp],
    ) -> ModelInputs:
        """Every tensor but `input_ids`: what follows from tables and lengths alone."""
        self._step = 0 if self._step == LAST_STEP_NUMBER else self._step + 1
        self._buffers.reverse()
        num_tokens, num_seqs = int(num_scheduled.sum()), len(rows)
        inputs = self._buffers[0].views(self._step, num_tokens, num_seqs, len(sampling))
        inputs.query_start_loc[0] = 0
        np.cumsum(num_scheduled, out=inputs.query_start_loc[1:])
        np.add(num_computed, num_scheduled, out=inputs.seq_lens)
        np.subtract(inputs.query_start_loc[1:][sampling], 1, out=inputs.logits_indices)

        width = -(-int(inputs.seq_lens.max()) // self.block_size)
        inputs.block_tables = inputs.block_tables[: num_seqs * width].reshape(num_seqs, width)
        inputs.block_tables[...] = self._block_tables[rows, :width]

        sequence = np.repeat(self._count[:num_seqs], num_scheduled)
        shift = num_computed - inputs.query_start_loc[:-1]
        np.add(self._count[:num_tokens], shift[sequence], out=inputs.positions)
        block, offset = np.divmod(inputs.positions, self.block_size)
        np.multiply(inputs.block_tables[sequence, block], self.block_size, out=inputs.slot_mapping)
        inputs.slot_mapping += offset
        return inputs

    def _fill_token_ids(
        self,
        inputs: ModelInputs,
        scheduled: SchedulerOutput,
        rows: NDArray[np.intp],
        num_computed: NDArray[np.int32],
        num_scheduled: NDArray[np.int32],
    ) -> None:
        """Decoding requests take the token sampled last from their row, the others from their own list."""
        decoding = (num_scheduled == 1) & (num_computed == self._last_position[rows])
        starts = inputs.query_start_loc[:-1]
        inputs.input_ids[starts[decoding]] = self._last_token[rows[decoding]]
        for index in np.flatnonzero(~decoding).tolist():
            first, count = scheduled.num_computed_tokens[index], scheduled.num_scheduled_tokens[index]
            start = int(starts[index])
            inputs.input_ids[start : start + count] = scheduled.requests[index].all_token_ids[
                first : first + count
            ]

    def _mark_sampled(self, sampling_rows: NDArray[np.intp], positions: NDArray[np.int32]) -> None:
        """Note where these rows sample a token, and keep its mark in its place."""
        self._last_token[sampling_rows] = -1 - self._count[: len(sampling_rows)]
        self._last_position[sampling_rows] = positions
        self._last_sampling_step[sampling_rows] = self._step


class _Buffers:
    """Memory for one step's tensors at their largest."""

    def __init__(self, max_num_seqs: int, max_num_batched_tokens: int, max_blocks: int) -> None:
        self._per_token = np.zeros((3, max_num_batched_tokens), dtype=np.int32)
        self._block_tables = np.zeros(max_num_seqs * max_blocks, dtype=np.int32)
        self._query_start_loc = np.zeros(max_num_seqs + 1, dtype=np.int32)
        self._per_seq = np.zeros((2, max_num_seqs), dtype=np.int32)
        self.sampling = np.zeros((max_num_seqs, NUM_SAMPLING_COLUMNS), dtype=np.float32)

    def views(self, step: int, num_tokens: int, num_seqs: int, num_sampled: int) -> ModelInputs:
        """Tensors for so many tokens, sequences and rows of logits; block_tables is flat, of full size."""
        return ModelInputs(
            step=step,
            input_ids=self._per_token[0, :num_tokens],
            positions=self._per_token[1, :num_tokens],
            slot_mapping=self._per_token[2, :num_tokens],
            block_tables=self._block_tables,
            query_start_loc=self._query_start_loc[: num_seqs + 1],
            seq_lens=self._per_seq[0, :num_seqs],
            logits_indices=self._per_seq[1, :num_sampled],
        )
