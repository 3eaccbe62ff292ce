"""Runs steps on the engine component that Triton hosts, by BLS calls to the model `engine`.

A BLS call never returns when the engine's process is killed. So calls are made by a thread of their own,
which is given up together with its call when the engine's process ends, the step's time is over or the
executor is closed, and replaced by a new one. Checking the step's tensors is the engine's business.
"""

from __future__ import annotations

import logging
import threading
import time
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quire.errors import EngineStepError, PeerLostError, QuireError
from quire.execution.executor import PoolInfo, StepOutput
from quire.execution.model_inputs import ModelInputs
from quire.interface import ENGINE_OUTPUTS, STEP_INPUTS
from quire.serving.rendezvous import Rendezvous
from quire.serving.scheduler.engine_call import (
    PROBE_INTERVAL_S,
    EngineStep,
    call_engine,
    check_answered,
    padding_step,
)
from quire.serving.watchdog import Process

_OUTPUT_NAMES = [spec.name for spec in ENGINE_OUTPUTS]
_log = logging.getLogger(__name__)


class _Caller:
    """A thread that makes one BLS call after the other until it is dismissed."""

    def __init__(self, access_key: bytes) -> None:
        self._access_key = np.frombuffer(access_key, np.uint8)
        self._steps: SimpleQueue[tuple[ModelInputs, EngineStep] | None] = SimpleQueue()
        threading.Thread(target=self._make_calls, name="quire-engine-calls", daemon=True).start()

    def call(self, inputs: ModelInputs, step: EngineStep) -> None:
        self._steps.put((inputs, step))

    def dismiss(self) -> None:
        """Have the thread end once its call returns, should it ever."""
        self._steps.put(None)

    def _make_calls(self) -> None:
        while (order := self._steps.get()) is not None:
            inputs, step = order
            try:
                step.end(self._run_step(inputs))
            except QuireError as error:
                step.end(error)

    def _run_step(self, inputs: ModelInputs) -> StepOutput:
        tensors: dict[str, NDArray[Any]] = {
            "access_key": self._access_key,
            "step": np.array([inputs.step], np.int32),
        }
        tensors |= {spec.name: getattr(inputs, spec.name) for spec in STEP_INPUTS}
        outputs = call_engine(tensors, _OUTPUT_NAMES)
        check_answered(inputs.step, int(outputs["step"][0]))
        num_blocks, epoch = outputs["pool_info"].tolist()
        return StepOutput(outputs["logits"], None, PoolInfo(num_blocks, epoch))


class TritonExecutor:
    """`Executor` of the hosted engine: one step at a time, token ids known when it is submitted.

    Args:
        rendezvous: where the engine announces its process, and the key that it asks for.
    """

    max_in_flight = 1
    token_feedback = False

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._rendezvous = rendezvous
        self._closed = threading.Event()
        # Guards what follows against the thread that notices the engine's end.
        self._lock = threading.Lock()
        self._engine: Process | None = None
        self._caller: _Caller | None = None
        self._step: EngineStep | None = None

    def pool_info(self, timeout_s: float) -> PoolInfo:
        """Wait until the engine can be called, at most `timeout_s`, and ask for its pool.

        Raises:
            PeerLostError: it could not be called in time, or the executor was closed.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self._attach()
                return self.submit(padding_step()).result(max(0.0, deadline - time.monotonic())).pool_info
            except (PeerLostError, EngineStepError) as error:
                if time.monotonic() + PROBE_INTERVAL_S > deadline:
                    raise PeerLostError(f"the engine does not answer: {error}") from None
            if self._closed.wait(PROBE_INTERVAL_S):
                raise PeerLostError("the server is stopping")

    def submit(self, inputs: ModelInputs) -> EngineStep:
        """Start a step; where no engine is known, the step's result is a `PeerLostError`."""
        step = EngineStep(self.give_up)
        with self._lock:
            if self._engine is None:
                step.end(PeerLostError("the engine's process is gone"))
                return step
            if self._caller is None:
                self._caller = _Caller(self._rendezvous.access_key)
            self._step = step
            self._caller.call(inputs, step)
        return step

    def give_up(self, error: QuireError) -> None:
        """End the step under way with `error` and leave its call to itself."""
        with self._lock:
            self._abandon(error)

    def close(self) -> None:
        """Give up the engine."""
        self._closed.set()
        with self._lock:
            self._engine = None
            self._abandon(PeerLostError("the server is stopping"))

    def _attach(self) -> None:
        """Find the engine's process, and have its end noticed."""
        engine = self._rendezvous.engine()
        with self._lock:
            if self._closed.is_set() or engine == self._engine:
                return
            self._engine = engine
        engine.when_gone(lambda: self._detach(engine), name="quire-engine-watch")

    def _detach(self, engine: Process) -> None:
        with self._lock:
            if self._engine == engine:
                _log.error("the engine's process is gone")
                self._engine = None
                self._abandon(PeerLostError("the engine's process is gone"))

    def _abandon(self, error: QuireError) -> None:
        if self._step is not None:
            self._step.end(error)
            self._step = None
        if self._caller is not None:
            self._caller.dismiss()
            self._caller = None
