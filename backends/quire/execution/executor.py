"""The seam between the step loop and whatever runs the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from quire.execution.model_inputs import ModelInputs


@dataclass(slots=True)
class PoolInfo:
    """The engine's KV pool, as the engine itself reports it."""

    num_blocks: int
    """Blocks in the pool, the null block (id 0) included."""
    epoch: int
    """Drawn anew by every engine process: a changed epoch means that the pool is empty."""


@dataclass(slots=True)
class StepOutput:
    """What the engine returned for one step: its logits, or the tokens that it sampled from them itself."""

    logits: NDArray[np.float32] | None
    """[N, vocab_size], one row for each entry of `logits_indices`; valid until the next step is submitted.
    May be None where `sampled_ids` are given."""
    sampled_ids: NDArray[np.int32] | None
    """[N] tokens, the caller's own; -1 where the best logit of the row is not a finite number. None where the
    step's inputs had no `sampling`."""
    pool_info: PoolInfo


class StepHandle(Protocol):
    """A step under way."""

    def result(self, timeout_s: float) -> StepOutput:
        """Wait for the step.

        Raises:
            PeerLostError: the process that runs the engine is gone.
            EngineStepError: the engine refused or failed the step, or `timeout_s` passed; whether the
                step changed the pool is then unknown.
        """
        ...


class Executor(Protocol):
    """Runs steps on one engine, in the order in which they were submitted.

    `max_in_flight` (1 or 2) is how many submitted steps may be uncollected. They are collected in the same
    order, and the inputs of a step are free for reuse once its result has been returned.

    An executor with `token_feedback` samples itself, by the step's `sampling`, and keeps the token ids of
    the step that it ran last. A step may so be submitted before the step before has been collected: in
    `input_ids`, -(r + 1) stands for the token sampled in row r of the step submitted just before. A step
    without `sampling` returns its logits from any executor.

    After a step failed, in `submit` or in `result`, the caller abandons every handle that it holds and calls
    `pool_info` before it submits again. Nothing is known then of the tokens sampled last: the next step
    has no marks.
    """

    max_in_flight: int
    token_feedback: bool

    def pool_info(self, timeout_s: float) -> PoolInfo:
        """Wait until the engine can be called, at most `timeout_s`, and ask for its pool.

        Steps that were submitted and not collected are given up by this call. When it returns, none is under
        way any more: none writes to the pool or reads its inputs.

        Raises:
            EngineDeadError: the engine is lost, and asking again will not bring it back.
            PeerLostError: the engine cannot be called, or a step is still under way.
        """
        ...

    def submit(self, inputs: ModelInputs) -> StepHandle:
        """Start a step. `inputs` must stay unchanged until its handle has returned a result.

        Raises:
            EngineStepError: the inputs break the engine contract, or the engine cannot begin the step.
        """
        ...

    def close(self) -> None:
        """Give up the engine; unfinished steps end with an error."""
        ...
