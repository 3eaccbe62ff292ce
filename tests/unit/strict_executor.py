"""An executor that holds its caller to the protocol, with or without token feedback, over a fake engine."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quire.errors import QuireError
from quire.execution.executor import PoolInfo, StepOutput
from quire.execution.model_inputs import InputsCheck, ModelInputs
from quire.execution.sampler import Sampler


@dataclass(frozen=True)
class Mode:
    """A way in which an engine core may run."""

    overlap: bool
    token_feedback: bool
    max_in_flight: int

    def __str__(self) -> str:
        turn = "overlapped" if self.overlap else "plain"
        return f"{turn}-feedback-{self.max_in_flight}" if self.token_feedback else turn


PLAIN, OVERLAPPED, AHEAD = Mode(False, False, 1), Mode(True, False, 1), Mode(True, True, 2)
MODES = (PLAIN, OVERLAPPED, AHEAD, Mode(False, True, 2), Mode(True, True, 1))


class StrictExecutor:
    """`Executor` whose engine is `compute`; a breach of the protocol is an AssertionError.

    A step runs when its result is asked for, as late as possible, and an abandoned one when the pool is asked
    for: inputs that were reused too early show.
    """

    def __init__(self, mode: Mode, check: InputsCheck, pool: PoolInfo) -> None:
        self.max_in_flight = mode.max_in_flight
        self.token_feedback = mode.token_feedback
        self.pool = pool
        self._check = check
        self._under_way: list[StrictStep] = []
        self._num_rows_before = 0
        self._sampled_ids = np.zeros(check.limits.max_num_seqs, np.int32)
        self._failed = False

    def compute(self, inputs: ModelInputs) -> NDArray[np.float32]:
        """Logits [N, vocab_size] of a step without marks; may raise."""
        raise NotImplementedError

    def pool_info(self, timeout_s: float) -> PoolInfo:
        for step in self._under_way:
            with contextlib.suppress(QuireError):
                self._run(step)
        self._under_way.clear()
        self._num_rows_before = 0
        self._failed = False
        return self.pool

    def submit(self, inputs: ModelInputs) -> StrictStep:
        assert not self._failed, "submitted after a failure, without asking for the pool"
        assert len(self._under_way) < self.max_in_flight, "too many steps in flight"
        assert (inputs.sampling is not None) == self.token_feedback
        self._check(inputs, self._num_rows_before if self.token_feedback else 0)
        self._num_rows_before = len(inputs.logits_indices)
        step = StrictStep(self, inputs)
        self._under_way.append(step)
        return step

    def close(self) -> None:
        pass

    def collect(self, step: StrictStep) -> StepOutput:
        assert not self._failed, "collected after a failure"
        assert self._under_way, "collected twice, or abandoned before"
        assert self._under_way.pop(0) is step, "collected out of order"
        try:
            return self._run(step)
        except QuireError:
            self._failed = True
            raise

    def _run(self, step: StrictStep) -> StepOutput:
        step.assert_unchanged()
        inputs = step.inputs
        marks = np.flatnonzero(inputs.input_ids < 0)
        input_ids = inputs.input_ids.copy()
        input_ids[marks] = self._sampled_ids[-1 - input_ids[marks]].clip(0)
        logits = self.compute(replace(inputs, input_ids=input_ids))
        if inputs.sampling is None:
            return StepOutput(logits, None, self.pool)
        usable = np.flatnonzero(np.isfinite(logits.max(axis=1, initial=-np.inf)))
        sampled_ids = self._sampled_ids[: len(logits)]
        sampled_ids[:] = -1
        sampled_ids[usable] = Sampler().sample_packed(logits[usable], inputs.sampling[usable])
        return StepOutput(None, sampled_ids.copy(), self.pool)


class StrictStep:
    """A step that notes what its inputs were when it was submitted."""

    def __init__(self, executor: StrictExecutor, inputs: ModelInputs) -> None:
        self.inputs = inputs
        self._executor = executor
        self._submitted = {name: np.copy(array) for name, array in _arrays(inputs).items()}

    def assert_unchanged(self) -> None:
        for name, array in _arrays(self.inputs).items():
            assert np.array_equal(array, self._submitted[name]), f"{name} changed under way"

    def result(self, timeout_s: float) -> StepOutput:
        return self._executor.collect(self)


def _arrays(inputs: ModelInputs) -> dict[str, NDArray[np.int32] | NDArray[np.float32]]:
    values = {name: getattr(inputs, name) for name in inputs.__slots__}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
