"""A fake engine whose next token is a hash of the whole context as read back through the block tables.

It stores the token and position of every scheduled token in its slot, all of a step before any is read. A
position that was written to another place than the one it is read from, or in another step than the
scheduler thinks, or with another token, changes the hash, and with it every token from there on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from quire.errors import QuireError
from quire.execution.executor import PoolInfo, StepOutput
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


class HashingExecutor:
    """`Executor` over a pool of such entries.

    A step runs when its result is asked for, as late as possible: inputs that were reused too early show.

    Args:
        config: of the scheduler that drives it.
        before_step: called with the number of each step, counted from 0, before it runs; may raise.
    """

    max_in_flight = 1
    token_feedback = False

    def __init__(
        self,
        config: SchedulerConfig,
        before_step: Callable[[int, HashingExecutor], None] = lambda number, executor: None,
    ) -> None:
        limits = EngineLimits(config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len)
        self.num_steps = 0
        self.epoch = 1
        self._config = config
        self._before_step = before_step
        self._check = InputsCheck(VOCAB_SIZE, config.block_size, config.num_blocks, limits)
        self._pool = np.zeros((config.num_blocks, config.block_size), np.uint64)

    def pool_info(self, timeout_s: float) -> PoolInfo:
        return PoolInfo(self._config.num_blocks, self.epoch)

    def submit(self, inputs: ModelInputs) -> HashingStep:
        return HashingStep(self, inputs)

    def close(self) -> None:
        pass

    def lose_pool(self) -> None:
        """What a new engine process amounts to: another epoch, and nothing of what was written."""
        self.epoch += 1
        self._pool[...] = 0

    def run(self, inputs: ModelInputs) -> StepOutput:
        number, self.num_steps = self.num_steps, self.num_steps + 1
        self._before_step(number, self)
        self._check(inputs)
        self._pool.reshape(-1)[inputs.slot_mapping] = inputs.input_ids.astype(np.uint64) << np.uint64(
            32
        ) | inputs.positions.astype(np.uint64)
        logits = np.zeros((len(inputs.logits_indices), VOCAB_SIZE), np.float32)
        for row, token in enumerate(inputs.logits_indices.tolist()):
            sequence = int(np.searchsorted(inputs.query_start_loc, token, side="right")) - 1
            context = self._pool[inputs.block_tables[sequence]].reshape(-1)
            logits[row] = context_logits(context[: int(inputs.positions[token]) + 1])
        return StepOutput(logits, None, self.pool_info(0))


class HashingStep:
    def __init__(self, executor: HashingExecutor, inputs: ModelInputs) -> None:
        self._executor = executor
        self._inputs = inputs

    def result(self, timeout_s: float) -> StepOutput:
        return self._executor.run(self._inputs)


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
