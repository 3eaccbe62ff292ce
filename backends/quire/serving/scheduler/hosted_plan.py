"""Runs steps on a TensorRT plan that Triton's own backend hosts, by BLS calls to the model `engine`.

The plan lives in the server's process, with which this one ends: nobody has to be watched. Triton's backend
keeps what it once copied into an input, so the KV pool and the plan's own state are inputs of which a call
sends the first element only. Block ids are not checked here: a plan's kernels take those outside the pool
for the null block.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.errors import EngineStepError, PeerLostError, QuireError
from quire.execution.executor import PoolInfo, StepOutput
from quire.execution.manifest import Manifest
from quire.execution.model_inputs import NUM_SAMPLING_COLUMNS, ModelInputs
from quire.execution.padding import blank_step, pad_into, step_row, step_size
from quire.interface import POOL_INPUT_PREFIX, STEP_INPUTS
from quire.serving.scheduler.engine_call import (
    PROBE_INTERVAL_S,
    EngineStep,
    call_engine,
    check_answered,
    padding_step,
)

LAST_EPOCH = 2**31 - 1
FIRST_COMPLAINT_S = 10.0
"""Silence of the engine that the log tells of; then again each time that it has doubled."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Call:
    """A submitted step, ready to be sent."""

    step: EngineStep
    number: int
    num_rows: int
    """Rows of logits that the step asked for; its padding may have added more."""
    tensors: dict[str, NDArray[Any]]
    outputs: tuple[str, ...]


class HostedPlanExecutor:
    """`Executor` of a hosted plan: it samples, and a step may wait here while the one before runs.

    One thread makes the calls, each as soon as the one before has returned, because Triton does not keep
    calls in order that are under way together. When a step fails, so does the one behind it, whose marks
    stood for the failed step's tokens.

    Args:
        manifest: the plan's.
    """

    max_in_flight = 2
    token_feedback = True

    def __init__(self, manifest: Manifest) -> None:
        plan = manifest.plan
        if plan is None:
            raise ValueError("the manifest describes no plan")
        self._input_names = manifest.inputs
        self._sizes, self._max_num_seqs = plan.step_sizes, manifest.limits.max_num_seqs
        self._table_width = -(-manifest.limits.max_model_len // manifest.block_size)
        first_element = np.zeros(1, np.int64)
        self._standing = {
            name: first_element for name in manifest.inputs if name.startswith(POOL_INPUT_PREFIX)
        }
        self._standing["engine_state"] = np.array([plan.max_blocks], np.int64)
        self._silent_since: float | None = None
        """When the engine was first asked for its pool without an answer."""
        self._complain_after_s = FIRST_COMPLAINT_S
        self._closed = threading.Event()
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        # Guards what follows: the steps that have not ended, in the order of their calls.
        self._lock = threading.Lock()
        self._steps: deque[EngineStep] = deque()
        threading.Thread(target=self._make_calls, name="quire-engine-calls", daemon=True).start()

    def pool_info(self, timeout_s: float) -> PoolInfo:
        """Wait until the engine can be called, at most `timeout_s`, and ask for its pool.

        Raises:
            PeerLostError: it could not be called in time, or the executor was closed.
        """
        deadline = time.monotonic() + timeout_s
        self.give_up(EngineStepError("the engine was asked for its pool before the step was collected"))
        probe = replace(padding_step(), sampling=_greedy(1))
        while True:
            try:
                # It waits for the call under way, so that none is left when this returns.
                info = self.submit(probe).result(max(0.0, deadline - time.monotonic())).pool_info
                self._silent_since, self._complain_after_s = None, FIRST_COMPLAINT_S
                return info
            except (PeerLostError, EngineStepError) as error:
                self._note_silence(error)
                if self._closed.is_set() or time.monotonic() + PROBE_INTERVAL_S > deadline:
                    raise PeerLostError(f"the engine does not answer: {error}") from None
            self._closed.wait(PROBE_INTERVAL_S)

    def _note_silence(self, error: QuireError) -> None:
        now = time.monotonic()
        if self._silent_since is None:
            self._silent_since = now
        silent_s = now - self._silent_since
        if silent_s >= self._complain_after_s and not self._closed.is_set():
            _log.warning("the engine has not answered for %.0f s: %s", silent_s, error)
            self._complain_after_s = 2 * silent_s

    def submit(self, inputs: ModelInputs) -> EngineStep:
        """Start a step, or have it wait for the one before."""
        step = EngineStep(self.give_up)
        call = self._call(step, inputs)
        with self._lock:
            if self._closed.is_set():
                step.end(PeerLostError("the server is stopping"))
            else:
                self._steps.append(step)
                self._calls.put(call)
        return step

    def give_up(self, error: QuireError) -> None:
        """End all steps with `error`; the call under way is left to itself and the next one is not made."""
        with self._lock:
            self._end_all(error)

    def close(self) -> None:
        """Give up the engine."""
        self._closed.set()
        self.give_up(PeerLostError("the server is stopping"))
        self._calls.put(None)

    def _call(self, step: EngineStep, inputs: ModelInputs) -> _Call:
        """What to send for a step."""
        sized = blank_step(step_size(self._sizes, inputs), self._max_num_seqs, self._table_width)
        pad_into(inputs, sized)
        names = (*(spec.name for spec in STEP_INPUTS), "sampling")
        tensors: dict[str, NDArray[Any]] = {name: getattr(sized, name) for name in names}
        # A plan whose state was lost begins an epoch with whatever the next step proposes.
        tensors["step"] = np.array(step_row(inputs, 1 + secrets.randbelow(LAST_EPOCH)), np.int32)
        tensors |= self._standing
        return _Call(
            step=step,
            number=inputs.step,
            num_rows=len(inputs.logits_indices),
            tensors={name: tensors[name] for name in self._input_names},
            outputs=("logits" if inputs.sampling is None else "sampled_ids", "pool_info", "step_done"),
        )

    def _make_calls(self) -> None:
        while (call := self._calls.get()) is not None:
            with self._lock:
                if call.step not in self._steps:
                    continue
            outcome: StepOutput | QuireError
            try:
                outcome = _run(call)
            except QuireError as error:
                outcome = error
            with self._lock:
                if call.step not in self._steps:
                    continue
                if isinstance(outcome, QuireError):
                    self._end_all(outcome)
                else:
                    self._steps.popleft().end(outcome)

    def _end_all(self, error: QuireError) -> None:
        while self._steps:
            self._steps.popleft().end(error)


def _run(call: _Call) -> StepOutput:
    outputs = call_engine(call.tensors, call.outputs)
    check_answered(call.number, int(outputs["step_done"][0]))
    num_blocks, epoch = outputs["pool_info"].tolist()
    pool = PoolInfo(num_blocks, epoch)
    if "logits" in outputs:
        return StepOutput(outputs["logits"][: call.num_rows], None, pool)
    return StepOutput(None, outputs["sampled_ids"][: call.num_rows].copy(), pool)


def _greedy(num_rows: int) -> NDArray[np.float32]:
    """[num_rows, 5] how to sample from rows of logits that nobody samples from."""
    return np.zeros((num_rows, NUM_SAMPLING_COLUMNS), np.float32)
