"""Steps by BLS calls, which may never return, to an engine whose process may end at any time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.unit.triton_stand_in import (
    InferenceResponse,
    StandIn,
    TritonError,
    TritonModelError,
    inside_triton,
    logits_answer,
)

from quire.errors import EngineStepError, PeerLostError
from quire.execution.model_inputs import ModelInputs
from quire.interface import ENGINE_INPUTS
from quire.serving.rendezvous import Rendezvous
from quire.serving.watchdog import Process

PATIENCE_S = 30

ANNOUNCE = """
import sys
from quire.serving.rendezvous import Rendezvous
Rendezvous.for_server(int(sys.argv[1])).announce_engine()
print("announced", flush=True)
sys.stdin.read()
"""


@dataclass
class Engine:
    """A process that has announced itself as the engine's, and the test's answers to calls of it."""

    rendezvous: Rendezvous
    triton: StandIn
    executor: Any
    calls: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    under_way: threading.Event = field(default_factory=threading.Event)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", ANNOUNCE, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "announced\n"

    def kill(self) -> None:
        self.processes[-1].kill()
        self.processes[-1].wait()

    def answers(self, answer: Callable[[dict[str, NDArray[Any]]], InferenceResponse]) -> None:
        def record(model_name: str, arrays: dict[str, NDArray[Any]]) -> InferenceResponse:
            assert model_name == "engine"
            self.calls.append(arrays)
            return answer(arrays)

        self.triton.answer = record

    def hangs(self) -> threading.Event:
        """Calls do not return until the event is set."""
        release = threading.Event()

        def hang(arrays: dict[str, NDArray[Any]]) -> InferenceResponse:
            self.under_way.set()
            release.wait(PATIENCE_S)
            return logits_answer(arrays)

        self.answers(hang)
        return release


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    with (
        TemporaryDirectory(prefix="q") as folder,
        inside_triton("scheduler.triton_executor") as (triton, [module]),
    ):
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        rendezvous = Rendezvous.for_server(os.getpid())
        engine = Engine(rendezvous, triton, module.TritonExecutor(rendezvous))
        engine.answers(logits_answer)
        yield engine
        engine.executor.close()
        for process in engine.processes:
            process.kill()
            process.communicate()
        rendezvous.remove()


def step(number: int = 7) -> ModelInputs:
    zeros = np.zeros(2, np.int32)
    return ModelInputs(
        step=number,
        input_ids=np.array([5, 6], np.int32),
        positions=zeros,
        slot_mapping=zeros,
        block_tables=np.zeros((2, 3), np.int32),
        query_start_loc=np.array([0, 1, 2], np.int32),
        seq_lens=zeros + 1,
        logits_indices=np.array([0, 1], np.int32),
    )


def test_a_step_carries_the_contracts_tensors_and_the_key(engine: Engine) -> None:
    engine.start()
    pool = engine.executor.pool_info(PATIENCE_S)
    assert (pool.num_blocks, pool.epoch) == (8, 1)
    output = engine.executor.submit(step()).result(PATIENCE_S)
    np.testing.assert_array_equal(output.logits, [[0, 1], [1, 2]])
    sent = engine.calls[-1]
    assert list(sent) == [spec.name for spec in ENGINE_INPUTS]
    assert sent["access_key"].tobytes() == engine.rendezvous.access_key
    np.testing.assert_array_equal(sent["input_ids"], [5, 6])


def test_the_engine_is_waited_for_while_it_loads(engine: Engine) -> None:
    refusals = iter([TritonModelError("BLS is only supported during execute"), None])

    def load_slowly(arrays: dict[str, NDArray[Any]]) -> InferenceResponse:
        if (refusal := next(refusals)) is not None:
            raise refusal
        return logits_answer(arrays)

    engine.answers(load_slowly)
    with pytest.raises(PeerLostError, match="has not been loaded yet"):
        engine.executor.pool_info(0)
    engine.start()
    assert engine.executor.pool_info(PATIENCE_S).num_blocks == 8
    assert len(engine.calls) == 2


def test_an_answer_to_another_step_is_an_error(engine: Engine) -> None:
    engine.start()
    engine.executor.pool_info(PATIENCE_S)
    engine.answers(lambda arrays: logits_answer({**arrays, "step": arrays["step"] - 1}))
    with pytest.raises(EngineStepError, match="answered step 6 in place of step 7"):
        engine.executor.submit(step(7)).result(PATIENCE_S)


def test_an_error_of_the_engine_fails_the_step_only(engine: Engine) -> None:
    engine.start()
    engine.executor.pool_info(PATIENCE_S)
    engine.answers(lambda arrays: InferenceResponse(failure=TritonError("seq_lens contains 0", 0)))
    with pytest.raises(EngineStepError, match="seq_lens contains 0"):
        engine.executor.submit(step()).result(PATIENCE_S)
    engine.answers(logits_answer)
    assert len(engine.executor.submit(step()).result(PATIENCE_S).logits) == 2


def test_a_step_whose_engine_is_killed_ends_though_its_call_never_returns(engine: Engine) -> None:
    engine.start()
    engine.executor.pool_info(PATIENCE_S)
    release = engine.hangs()
    under_way = engine.executor.submit(step())
    assert engine.under_way.wait(PATIENCE_S)
    engine.kill()
    with pytest.raises(PeerLostError, match="gone"):
        under_way.result(PATIENCE_S)
    with pytest.raises(PeerLostError, match="gone"):
        engine.executor.submit(step()).result(PATIENCE_S)
    with pytest.raises(PeerLostError, match="gone"):
        engine.executor.pool_info(0)

    engine.answers(lambda arrays: logits_answer(arrays, epoch=2))
    engine.start()
    assert engine.executor.pool_info(PATIENCE_S).epoch == 2
    assert len(engine.executor.submit(step()).result(PATIENCE_S).logits) == 2
    release.set()


def test_a_step_that_takes_too_long_is_given_up_and_its_late_answer_ignored(engine: Engine) -> None:
    engine.start()
    engine.executor.pool_info(PATIENCE_S)
    release = engine.hangs()
    with pytest.raises(EngineStepError, match=r"longer than 0.01 s"):
        engine.executor.submit(step(1)).result(0.01)
    engine.answers(logits_answer)
    following = engine.executor.submit(step(2))
    release.set()
    np.testing.assert_array_equal(following.result(PATIENCE_S).logits, [[0, 1], [1, 2]])


def test_closing_ends_a_step_under_way_and_waiting_for_the_engine(engine: Engine) -> None:
    engine.start()
    engine.executor.pool_info(PATIENCE_S)
    release = engine.hangs()
    under_way = engine.executor.submit(step())
    engine.executor.close()
    with pytest.raises(PeerLostError, match="stopping"):
        under_way.result(PATIENCE_S)
    with pytest.raises(PeerLostError, match="stopping"):
        engine.executor.pool_info(PATIENCE_S)
    release.set()


def test_the_watched_process_is_the_one_that_announced_itself(engine: Engine) -> None:
    engine.start()
    assert engine.rendezvous.engine() == Process.running(engine.processes[-1].pid)
