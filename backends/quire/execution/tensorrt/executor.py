"""`Executor` of a TensorRT plan in this process."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from quire.errors import EngineDeadError, EngineStepError, PeerLostError
from quire.execution.executor import PoolInfo, StepOutput
from quire.execution.model_inputs import InputsCheck, ModelInputs
from quire.execution.tensorrt.buffers import StepBuffers
from quire.execution.tensorrt.device import DeviceError, Event
from quire.execution.tensorrt.engine import MAX_UNDER_WAY, TensorRTEngine

SPIN_S = 50e-6
"""How long to ask for a step's end again and again before sleeping in between."""
LONGEST_SLEEP_S = 100e-6
CLOSE_TIMEOUT_S = 1.0


class TensorRTExecutor:
    """Runs steps on an engine in this process, two under way at most.

    Some CUDA errors end the use of the GPU by this process. Whether one did shows when `pool_info` asks the
    GPU next: then it raises `EngineDeadError`, and so it does from then on.

    Args:
        engine: closed with this.
        return_logits: whether steps that are sampled return their logits too.
    """

    max_in_flight = MAX_UNDER_WAY
    token_feedback = True

    def __init__(self, engine: TensorRTEngine, *, return_logits: bool = False) -> None:
        self._engine, self._return_logits = engine, return_logits
        self._check = InputsCheck(
            engine.manifest.model.vocab_size,
            engine.manifest.block_size,
            engine.pool_info.num_blocks,
            engine.limits,
        )
        self._idle = engine.device.event()
        self._closed = threading.Event()
        # Guards the engine and what follows against `close` from another thread.
        self._lock = threading.Lock()
        self._unused = deque(engine.buffers)
        self._num_sampled_before = 0
        self._generation = 0
        """Counts the calls of `pool_info`, each of which gives up the steps before."""
        self._failed = False
        """Whether a step failed and `pool_info` has not been called since."""

    def pool_info(self, timeout_s: float) -> PoolInfo:
        """The engine's pool, once no step is under way any more.

        Raises:
            EngineDeadError: the GPU is lost to this process.
            PeerLostError: a step is still under way after `timeout_s`, or the executor was closed.
        """
        try:
            with self._lock:
                self._refuse_if_closed()
                self._generation += 1
                self._engine.device.record(self._idle)
            if not self._wait(self._idle, timeout_s):
                raise PeerLostError(f"the engine still computes a step after {timeout_s:g} s")
        except DeviceError as error:
            raise EngineDeadError(f"the GPU is lost: {error}") from None
        self._unused = deque(self._engine.buffers)
        self._num_sampled_before = 0
        self._failed = False
        return self._engine.pool_info

    def submit(self, inputs: ModelInputs) -> TensorRTStep:
        """Queue a step; where it may have marks, they refer to the step queued last.

        Raises:
            EngineStepError: as `Executor.submit`.
            PeerLostError: a step failed and `pool_info` was not asked since, or the executor was closed.
        """
        num_rows = len(inputs.logits_indices)
        self._check(inputs, self._num_sampled_before)
        if num_rows > self._engine.max_rows:
            raise EngineStepError(
                f"logits_indices has {num_rows} rows; it must have at most {self._engine.max_rows}"
            )
        wants_logits = self._return_logits or inputs.sampling is None
        with self._lock:
            self._refuse_if_closed()
            if self._failed:
                raise PeerLostError("the engine failed a step before")
            if not self._unused:
                raise EngineStepError(f"{MAX_UNDER_WAY} steps are under way; collect one of them first")
            buffers = self._unused.popleft()
            try:
                self._engine.begin(inputs, buffers, wants_logits=wants_logits)
            except DeviceError as error:
                self._failed = True
                raise EngineStepError(f"step {inputs.step} cannot be run: {error}") from None
        sampled = inputs.sampling is not None
        self._num_sampled_before = num_rows if sampled else 0
        return TensorRTStep(self, buffers, inputs.step, num_rows, sampled, wants_logits, self._generation)

    def collect(self, step: TensorRTStep, timeout_s: float) -> StepOutput:
        """Wait for a step; errors are those of `StepHandle.result`."""
        if step.generation != self._generation:
            raise EngineStepError(f"step {step.number} was given up")
        try:
            if not self._wait(step.buffers.done, timeout_s):
                raise EngineStepError(f"step {step.number} took longer than {timeout_s:g} s")
            with self._lock:  # closing frees what is read here
                self._refuse_if_closed()
                token_ids = self._engine.collect(step.buffers, step.number, step.num_rows).copy()
        except DeviceError as error:
            self._failed = True
            raise EngineStepError(f"step {step.number} failed: {error}") from None
        except EngineStepError:
            self._failed = True
            raise
        self._unused.append(step.buffers)
        logits = None
        if step.wants_logits:
            logits = step.buffers.logits(step.num_rows, self._engine.manifest.model.vocab_size)
        return StepOutput(logits, token_ids if step.sampled else None, self._engine.pool_info)

    def close(self) -> None:
        """Give up the engine, whatever is under way; may be called from another thread.

        What a GPU that does not answer holds stays with it until this process ends.
        """
        self._closed.set()
        with self._lock:
            if self._engine.closed:
                return
            device = self._engine.device
            try:
                device.record(self._idle)
                if _poll(lambda: device.is_done(self._idle), CLOSE_TIMEOUT_S):
                    self._engine.close()
            except DeviceError:
                return

    def _refuse_if_closed(self) -> None:
        if self._closed.is_set():
            raise PeerLostError("the server is stopping")

    def _wait(self, event: Event, timeout_s: float) -> bool:
        """Whether the event is done within `timeout_s`."""

        def is_done() -> bool:
            with self._lock:
                self._refuse_if_closed()
                return self._engine.device.is_done(event)

        return _poll(is_done, timeout_s)


@dataclass(frozen=True, slots=True)
class TensorRTStep:
    """A step under way."""

    executor: TensorRTExecutor
    buffers: StepBuffers
    number: int
    num_rows: int
    sampled: bool
    wants_logits: bool
    generation: int

    def result(self, timeout_s: float) -> StepOutput:
        """Wait for the step; errors are those of `StepHandle.result`."""
        return self.executor.collect(self, timeout_s)


def _poll(is_done: Callable[[], bool], timeout_s: float) -> bool:
    """Whether it is done within `timeout_s`: asks at once, then again and again, then with sleeps between."""
    began = time.monotonic()
    pause = LONGEST_SLEEP_S / 8
    while not is_done():
        waited = time.monotonic() - began
        if waited >= timeout_s:
            return False
        if waited >= SPIN_S:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_SLEEP_S)
    return True
