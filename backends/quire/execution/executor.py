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
    """What the engine returned for one step."""

    logits: NDArray[np.float32]
    """[N, vocab_size], one row for each entry of `logits_indices`; valid until the next step is submitted."""
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

    `max_in_flight` (1 or 2) is how many submitted steps may be unfinished. An executor with
    `token_feedback` keeps the token ids that it sampled last, so that a step may be submitted before
    the step before has been collected.
    """

    max_in_flight: int
    token_feedback: bool

    def pool_info(self, timeout_s: float) -> PoolInfo:
        """Wait until the engine can be called, at most `timeout_s`, and ask for its pool."""
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
