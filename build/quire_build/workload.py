"""A fixed workload of interleaved sequences that drives an engine without a scheduler.

Sequences arrive at different steps, prompts are computed in chunks beside sequences that decode, block
tables are shuffled: every way in which the packing of a step can go wrong gets a chance to. The numerics
gate and the parity tests run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.execution.model_inputs import ModelInputs

ARRIVAL_STEPS = (0, 0, 3, 5, 9, 20)
"""When sequences arrive; further ones arrive together with the last."""


@dataclass(slots=True)
class WorkloadSequence:
    """One sequence: its prompt, then its tokens so far."""

    token_ids: list[int]
    num_prompt_tokens: int
    continuation: tuple[int, ...]
    """What comes after the prompt; empty where the reference decides."""
    block_ids: NDArray[np.int32]
    arrival_step: int
    num_computed_tokens: int = 0

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.token_ids[self.num_prompt_tokens :]


class Workload:
    """Sequences, and the steps that compute them.

    Call `next_step` for a step's inputs, run them, and hand the logits to `advance`, until `next_step`
    returns None. All positions of a step want logits, up to `max_logits_rows`.

    Args:
        prompts: token ids of each sequence.
        num_new_tokens: tokens that each sequence gets after its prompt, one a step: its continuation's, or
            else the most probable ones.
        block_size: tokens in a block.
        max_num_seqs: sequences in one step.
        max_num_batched_tokens: tokens in one step.
        chunk: tokens of a prompt that are computed in one step.
        continuations: the `num_new_tokens` tokens after each prompt; None takes what the logits say.
        max_logits_rows: rows of logits in one step; None for no limit, else at least `max_num_seqs`. The last
            position of each sequence is among them, the rest is spread evenly over the step.
        seed: of the shuffled block tables.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_new_tokens: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        chunk: int = 37,
        continuations: Sequence[Sequence[int]] | None = None,
        max_logits_rows: int | None = None,
        seed: int = 0,
    ) -> None:
        self._block_size = block_size
        self._num_new_tokens = num_new_tokens
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._chunk = chunk
        self._max_logits_rows = max_logits_rows or max_num_batched_tokens
        self._logits_rows: NDArray[np.int32] = np.zeros(0, np.int32)
        self._step = 0
        self.is_text = continuations is not None
        """Whether what comes next is given, and not what the logits say."""
        self.scheduled: list[tuple[WorkloadSequence, int]] = []
        """The sequences of the current step, each with its number of tokens, in the order of the rows."""
        blocks_needed = [-(-(len(prompt) + num_new_tokens) // block_size) for prompt in prompts]
        self.num_blocks = 1 + sum(blocks_needed)
        """Blocks that the pool must have, the null block included."""
        self.max_sequence_len = max(len(prompt) for prompt in prompts) + num_new_tokens
        """Tokens of the longest sequence at its end."""
        shuffled = np.random.default_rng(seed).permutation(np.arange(1, self.num_blocks, dtype=np.int32))
        tables = np.split(shuffled, np.cumsum(blocks_needed)[:-1])
        self.sequences = [
            WorkloadSequence(
                token_ids=list(prompt),
                num_prompt_tokens=len(prompt),
                continuation=tuple(continuations[number]) if continuations else (),
                block_ids=table,
                arrival_step=ARRIVAL_STEPS[min(number, len(ARRIVAL_STEPS) - 1)],
            )
            for number, (prompt, table) in enumerate(zip(prompts, tables, strict=True))
        ]

    def next_step(self) -> ModelInputs | None:
        """The next step's inputs, or None when every sequence has its new tokens."""
        unfinished = [sequence for sequence in self.sequences if not self._is_finished(sequence)]
        if not unfinished:
            return None
        self._step = max(self._step + 1, min(sequence.arrival_step for sequence in unfinished))
        self.scheduled = []
        budget = self._max_num_batched_tokens
        for sequence in unfinished:
            if sequence.arrival_step > self._step or len(self.scheduled) == self._max_num_seqs:
                continue
            remaining = len(sequence.token_ids) - sequence.num_computed_tokens
            num_tokens = min(self._chunk, remaining, budget)
            if num_tokens:
                self.scheduled.append((sequence, num_tokens))
                budget -= num_tokens
        return self._pack()

    def advance(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Take the step's logits [N, vocab_size]: a sequence computed to its end gets its next token.

        Returns:
            int64 [N], the token after the position of each row; -1 where that is part of a prompt whose
            continuation the reference decides: such prompts are made up, and nobody predicts them.
        """
        following: list[int] = []
        for sequence, num_tokens in self.scheduled:
            first = sequence.num_computed_tokens + 1
            sequence.num_computed_tokens += num_tokens
            if sequence.num_computed_tokens == len(sequence.token_ids):
                row = np.searchsorted(self._logits_rows, len(following) + num_tokens - 1)
                place = len(sequence.generated)
                sequence.token_ids.append(
                    sequence.continuation[place] if sequence.continuation else int(logits[row].argmax())
                )
            known = 0 if sequence.continuation else sequence.num_prompt_tokens
            following += [
                sequence.token_ids[position] if position >= known else -1
                for position in range(first, first + num_tokens)
            ]
        return np.array(following, np.int64)[self._logits_rows]

    def _is_finished(self, sequence: WorkloadSequence) -> bool:
        return len(sequence.generated) == self._num_new_tokens

    def _pack(self) -> ModelInputs:
        spans = [
            (sequence, np.arange(sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens))
            for sequence, num_tokens in self.scheduled
        ]
        block_tables = np.zeros((len(spans), max(len(sequence.block_ids) for sequence, _ in spans)), np.int32)
        for row, (sequence, _) in enumerate(spans):
            block_tables[row, : len(sequence.block_ids)] = sequence.block_ids
        size = self._block_size
        slots = [sequence.block_ids[span // size] * size + span % size for sequence, span in spans]
        positions = np.concatenate([span for _, span in spans]).astype(np.int32)
        query_start_loc = np.cumsum([0, *(len(span) for _, span in spans)], dtype=np.int32)
        self._logits_rows = _spread(query_start_loc[1:] - 1, len(positions), self._max_logits_rows)
        return ModelInputs(
            step=self._step,
            input_ids=np.concatenate(
                [np.array(sequence.token_ids, np.int32)[span] for sequence, span in spans]
            ),
            positions=positions,
            slot_mapping=np.concatenate(slots).astype(np.int32),
            block_tables=block_tables,
            query_start_loc=query_start_loc,
            seq_lens=np.array([span[-1] + 1 for _, span in spans], np.int32),
            logits_indices=self._logits_rows,
        )


def _spread(wanted: NDArray[np.int32], num_tokens: int, limit: int) -> NDArray[np.int32]:
    """Ascending rows of a step, at most `limit` of them: the wanted ones and an even choice of the rest."""
    others = np.setdiff1d(np.arange(num_tokens, dtype=np.int32), wanted)
    room = min(limit - len(wanted), len(others))
    chosen = others[np.arange(room) * len(others) // max(room, 1)]
    return np.sort(np.concatenate([wanted, chosen])).astype(np.int32)
