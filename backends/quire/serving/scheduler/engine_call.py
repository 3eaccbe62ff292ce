"""A BLS call of the model `engine`, and the handle of a step that such a call runs.

What the tensors are, in which order steps are called and what happens to a step whose call does not return
is the executors' business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]
from numpy.typing import NDArray

from quire.errors import EngineStepError, QuireError
from quire.execution.executor import StepOutput
from quire.execution.model_inputs import ModelInputs
from quire.interface import ENGINE

PROBE_INTERVAL_S = 0.1
"""Between two attempts to call an engine that cannot be called yet."""


class EngineStep:
    """A step under way; `StepHandle` of an engine behind Triton.

    Args:
        give_up: ends the step with an error, and whatever else cannot go on without it.
    """

    def __init__(self, give_up: Callable[[QuireError], None]) -> None:
        self._give_up = give_up
        self._outcome: SimpleQueue[StepOutput | QuireError] = SimpleQueue()

    def end(self, outcome: StepOutput | QuireError) -> None:
        """Say how the step ended; the first one to say so counts."""
        self._outcome.put(outcome)

    def result(self, timeout_s: float) -> StepOutput:
        """Wait for the step; errors are those of `StepHandle.result`."""
        try:
            outcome = self._outcome.get(timeout=timeout_s)
        except Empty:
            self._give_up(EngineStepError(f"a step took longer than {timeout_s:g} s"))
            outcome = self._outcome.get()
        if isinstance(outcome, QuireError):
            raise outcome
        return outcome


def call_engine(tensors: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Call the model `engine` and wait for its answer, for ever if its process is killed.

    Args:
        tensors: its inputs by name.
        outputs: names of the outputs to ask for.

    Returns:
        The outputs by name, in this process's memory.

    Raises:
        EngineStepError: the engine refused, or Triton did not take the call: models are still being loaded,
            or the server stops.
    """
    try:
        answer = pb_utils.InferenceRequest(
            model_name=ENGINE,
            requested_output_names=list(outputs),
            inputs=[pb_utils.Tensor(name, array) for name, array in tensors.items()],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()
        if answer.has_error():
            raise EngineStepError(answer.error().message())
        return {tensor.name(): tensor.as_numpy() for tensor in answer.output_tensors()}
    except QuireError:
        raise
    except Exception as error:
        raise EngineStepError(f"the engine cannot be called: {error}") from error


def check_answered(number: int, answered: int) -> None:
    """Check that an answer is the one to the step `number`.

    Raises:
        EngineStepError: it is another's.
    """
    if answered != number:
        raise EngineStepError(f"the engine answered step {answered} in place of step {number}")


def padding_step() -> ModelInputs:
    """A step that changes nothing: one padding sequence, as the engine contract defines it."""
    zero, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    return ModelInputs(
        step=0,
        input_ids=zero,
        positions=zero,
        slot_mapping=zero,
        block_tables=np.zeros((1, 1), np.int32),
        query_start_loc=np.array([0, 1], np.int32),
        seq_lens=one,
        logits_indices=zero,
    )
