"""A fake engine whose next token is a hash of the whole context as read back through the block tables.

It stores the token and position of every scheduled token in its slot, all of a step before any is read. A
position that was written to another place than the one it is read from, or in another step than the
scheduler thinks, or with another token, changes the hash, and with it every token from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from tests.unit.strict_executor import Mode, StrictExecutor

from quire.errors import QuireError
from quire.execution.executor import PoolInfo
from quire.execution.manifest import EngineLimits
from quire.execution.model_inputs import InputsCheck, ModelInputs
from quire.scheduling.scheduler import SchedulerConfig

VOCAB_SIZE = 61
MAX_LENGTH = 4096

_WEIGHTS = np.random.default_rng(0).integers(0, 2**63, MAX_LENGTH, dtype=np.uint64) | np.uint64(1)
_SCATTER = np.random.default_rng(1).integers(0, 2**63, VOCAB_SIZE, dtype=np.uint64) | np.uint64(1)


def context_logits(entries: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Logits [VOCAB_SIZE] that depend on every one of a context's entries and on their order."""
    digest = (entries * _WEIGHTS[: len(entries)]).sum()
    digest ^= digest >> np.uint64(29)
    spread = (digest * _SCATTER) >> np.uint64(40)
    logits: NDArray[np.float32] = spread.astype(np.float32) / np.float32(2**22)
    return logits


def entries_of(token_ids: Sequence[int]) -> NDArray[np.uint64]:
    """What the pool holds of a sequence: token and position of each."""
    positions = np.arange(len(token_ids), dtype=np.uint64)
    return np.array(token_ids, np.uint64) << np.uint64(32) | positions


class HashingExecutor(StrictExecutor):
    """`Executor` over a pool of such entries.

    Args:
        config: of the scheduler that drives it.
        mode: whether tokens are fed back, and how many steps may be in flight.
        before_step: called with the number of each step, counted from 0, before it runs; may raise.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        mode: Mode,
        before_step: Callable[[int, HashingExecutor], None] = lambda number, executor: None,
    ) -> None:
        limits = EngineLimits(config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len)
        super().__init__(
            mode,
            InputsCheck(VOCAB_SIZE, config.block_size, config.num_blocks, limits),
            PoolInfo(config.num_blocks, epoch=1),
        )
        self.num_steps = 0
        self._before_step = before_step
        self._entries = np.zeros((config.num_blocks, config.block_size), np.uint64)

    def lose_pool(self) -> None:
        """What a new engine process amounts to: another epoch, and nothing of what was written."""
        self.pool = PoolInfo(self.pool.num_blocks, self.pool.epoch + 1)
        self._entries[...] = 0

    def compute(self, inputs: ModelInputs) -> NDArray[np.float32]:
        number, self.num_steps = self.num_steps, self.num_steps + 1
        self._before_step(number, self)
        self._entries.reshape(-1)[inputs.slot_mapping] = inputs.input_ids.astype(np.uint64) << np.uint64(
            32
        ) | inputs.positions.astype(np.uint64)
        logits = np.zeros((len(inputs.logits_indices), VOCAB_SIZE), np.float32)
        for row, token in enumerate(inputs.logits_indices.tolist()):
            sequence = int(np.searchsorted(inputs.query_start_loc, token, side="right")) - 1
            context = self._entries[inputs.block_tables[sequence]].reshape(-1)
            logits[row] = context_logits(context[: int(inputs.positions[token]) + 1])
        return logits


class Failures:
    """Raises or loses the pool at chosen steps.

    Args:
        errors: by number of the step; None stands for a pool that was lost without an error.
    """

    def __init__(self, errors: dict[int, QuireError | None]) -> None:
        self.num_failures = 0
        self._errors = errors

    def __call__(self, number: int, executor: HashingExecutor) -> None:
        if number not in self._errors:
            return
        self.num_failures += 1
        executor.lose_pool()
        if error := self._errors[number]:
            raise error
