"""The step loop between a channel and an engine, both played by the test."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest
from tests.unit import fake_gpu

from quire.engine_core import EngineCore
from quire.errors import EngineDeadError, EngineStepError, PeerLostError, QuireError
from quire.execution.executor import Executor, PoolInfo, StepOutput
from quire.execution.manifest import EngineLimits
from quire.execution.model_inputs import ModelInputs
from quire.execution.sampler import Sampler
from quire.execution.tensorrt.engine import TensorRTEngine
from quire.execution.tensorrt.executor import TensorRTExecutor
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig
from quire.serving.channel import ChannelStatistics, FrontendLost, SchedulerChannel
from quire.serving.messages import Abort, Finished, Refusal, StepTokens, Submit, ToFrontend
from quire.serving.scheduler.step_loop import StepLoop

PATIENCE_S = 30
VOCAB_SIZE = 16
NUM_BLOCKS = 9
BLOCK_SIZE = 4
MAX_MODEL_LEN = 24
ALICE, BOB = b"alice", b"bob"


class FakeChannel:
    """Arrivals are put in by the test, which also gets what is sent."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.frontends = ["alice", "bob"]
        self.statistics = ChannelStatistics()
        self._lock = threading.Lock()
        self.sent: queue.Queue[list[tuple[bytes, ToFrontend]]] = queue.Queue()
        self._inbox: queue.SimpleQueue[tuple[bytes, Submit | Abort | FrontendLost]] = queue.SimpleQueue()

    def arrive(self, *events: tuple[bytes, Submit | Abort | FrontendLost]) -> None:
        """Have all of them arrive at once."""
        with self._lock:
            for event in events:
                self._inbox.put(event)
            self.arrived.set()

    def receive(self) -> list[tuple[bytes, Submit | Abort | FrontendLost]]:
        with self._lock:
            self.arrived.clear()
            return [self._inbox.get() for _ in range(self._inbox.qsize())]

    def send(self, messages: Iterable[tuple[bytes, ToFrontend]]) -> None:
        self.sent.put(list(messages))

    def next(self) -> list[tuple[bytes, ToFrontend]]:
        return self.sent.get(timeout=PATIENCE_S)

    def next_refusal(self) -> Refusal:
        """The next refusal, past the tokens that may come before it."""
        while True:
            for _, message in self.next():
                if isinstance(message, Refusal):
                    return message


@dataclass
class FakeStep:
    """Ends when the engine is told to run it."""

    outcome: queue.Queue[StepOutput | QuireError] = field(default_factory=queue.Queue)

    def result(self, timeout_s: float) -> StepOutput:
        outcome = self.outcome.get(timeout=PATIENCE_S)
        if isinstance(outcome, QuireError):
            raise outcome
        return outcome


class CountingEngine:
    """An engine whose next token is the last one plus 1. While paused, each step waits for `run`."""

    max_in_flight = 1
    token_feedback = False

    def __init__(self, *, paused: bool = False) -> None:
        self._paused = paused
        self._lock = threading.Lock()
        self.present = threading.Event()
        self.present.set()
        self.closed = threading.Event()
        self.dead = False
        self.waiting: queue.Queue[tuple[FakeStep, StepOutput]] = queue.Queue()

    def pool_info(self, timeout_s: float) -> PoolInfo:
        if self.dead:
            raise EngineDeadError("the GPU is lost: cudaErrorIllegalAddress")
        if self.closed.is_set() or not self.present.wait(0.01):
            raise PeerLostError("the engine does not answer")
        return PoolInfo(NUM_BLOCKS, epoch=1)

    def submit(self, inputs: ModelInputs) -> FakeStep:
        step = FakeStep()
        following = (inputs.input_ids[inputs.logits_indices] + 1) % VOCAB_SIZE
        output = StepOutput(
            np.eye(VOCAB_SIZE, dtype=np.float32)[following], None, PoolInfo(NUM_BLOCKS, epoch=1)
        )
        if not self.present.is_set():
            step.outcome.put(PeerLostError("the engine's process is gone"))
        else:
            self.waiting.put((step, output))
            self._run_unless_paused()
        return step

    def go_on(self) -> None:
        """Let all steps finish, from now on."""
        self._paused = False
        self._run_unless_paused()

    def _run_unless_paused(self) -> None:
        with self._lock:
            while not self._paused and not self.waiting.empty():
                self.run()

    def run(self) -> None:
        """Let the step under way finish."""
        step, output = self.waiting.get(timeout=PATIENCE_S)
        step.outcome.put(output)

    def die(self) -> None:
        """End the step under way and every later one with a lost peer."""
        step, _ = self.waiting.get(timeout=PATIENCE_S)
        self.present.clear()
        step.outcome.put(PeerLostError("the engine's process is gone"))

    def close(self) -> None:
        self.closed.set()
        while not self.waiting.empty():
            self.waiting.get()[0].outcome.put(PeerLostError("the server is stopping"))


@dataclass
class Bench:
    """A running loop and its neighbours."""

    channel: FakeChannel
    engine: CountingEngine
    loop: StepLoop
    end: queue.Queue[EngineDeadError]
    """What the server was ended with."""

    def assert_all_is_over(self, reason: str, *request_ids: str) -> None:
        """The server ends, for these requests have been told why; whoever comes late is told the same."""
        error = self.end.get(timeout=PATIENCE_S)
        assert str(error) == f"{reason}; the server ends, try again later"
        told = [message for batch in iter_now(self.channel.sent) for _, message in batch]
        expected = [Refusal(request_id, "EngineDeadError", str(error)) for request_id in request_ids]
        assert [message for message in told if isinstance(message, Refusal)] == expected
        self.channel.arrive((BOB, submit("late")))
        assert self.channel.next() == [(BOB, Refusal("late", "EngineDeadError", str(error)))]
        self.loop.drain()
        self.loop.stop()
        assert self.end.empty()
        assert "quire-step-loop" not in {thread.name for thread in threading.enumerate()}

    def tokens_of(self, frontend: bytes, request_id: str) -> list[int]:
        """The tokens of a request that is the only one, to its end."""
        tokens: list[int] = []
        while True:
            for receiver, message in self.channel.next():
                assert receiver == frontend
                assert isinstance(message, StepTokens)
                assert message.request_ids == [request_id]
                tokens += message.token_ids
                if message.finished:
                    return tokens


StartLoop = Callable[..., Bench]


@pytest.fixture
def start_loop() -> Iterator[StartLoop]:
    loops: list[StepLoop] = []

    def start(
        *,
        max_queued_requests: int = 8,
        max_num_seqs: int = 4,
        paused: bool = False,
        absent: bool = False,
        executor: Executor | None = None,
        step_timeout_s: float = PATIENCE_S,
    ) -> Bench:
        engine = CountingEngine(paused=paused)
        if absent:
            engine.present.clear()
        chosen: Executor = executor or engine
        config = SchedulerConfig(
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            max_num_batched_tokens=64,
            max_num_seqs=max_num_seqs,
            max_model_len=MAX_MODEL_LEN,
            async_scheduling=True,
        )
        channel = FakeChannel()
        end: queue.Queue[EngineDeadError] = queue.Queue()
        loop = StepLoop(
            chosen,
            lambda pool: EngineCore(Scheduler(config), chosen, Sampler(), step_timeout_s=step_timeout_s),
            cast(SchedulerChannel, channel),
            end_server=end.put,
            max_queued_requests=max_queued_requests,
        )
        loops.append(loop)
        return Bench(channel, engine, loop, end)

    yield start
    for loop in loops:
        loop.stop()


def submit(request_id: str, prompt: list[int] | None = None, max_tokens: int = 3) -> Submit:
    return Submit(request_id, prompt or [1, 2, 3], SamplingParams(max_tokens=max_tokens, temperature=0.0))


def test_each_frontend_gets_one_message_per_step_with_all_its_tokens(start_loop: StartLoop) -> None:
    bench = start_loop()
    # Equal ids of two frontends are two requests.
    bench.channel.arrive(
        (ALICE, submit("a", [5])), (ALICE, submit("b", [8])), (BOB, submit("a", [9], max_tokens=1))
    )
    assert dict(bench.channel.next()) == {
        ALICE: StepTokens(["a", "b"], [6, 9], []),
        BOB: StepTokens(["a"], [10], [Finished("a", "length")]),
    }
    assert bench.channel.next() == [(ALICE, StepTokens(["a", "b"], [7, 10], []))]


def test_a_request_runs_to_its_end_and_the_loop_then_sleeps(start_loop: StartLoop) -> None:
    bench = start_loop()
    bench.channel.arrive((ALICE, submit("a", max_tokens=5)))
    assert bench.tokens_of(ALICE, "a") == [4, 5, 6, 7, 8]
    bench.loop.drain()
    statistics = bench.loop.statistics()
    assert statistics.running_requests == statistics.waiting_requests == 0
    assert statistics.free_blocks == statistics.blocks == NUM_BLOCKS - 1
    assert statistics.generated_tokens == 5
    assert statistics.computed_tokens == 3 + 4
    assert not bench.channel.arrived.is_set()
    assert bench.channel.sent.empty()


def test_more_requests_than_may_wait_are_refused_with_when_to_try_again(start_loop: StartLoop) -> None:
    bench = start_loop(max_queued_requests=2, max_num_seqs=1, paused=True)
    bench.channel.arrive((ALICE, submit("running")))
    bench.engine.run()
    bench.channel.next()
    bench.channel.arrive(*[(ALICE, submit(name)) for name in ("first", "second", "third")])
    bench.engine.run()
    refusal = bench.channel.next_refusal()
    assert (refusal.request_id, refusal.error) == ("third", "OverloadedError")
    assert "2 requests are waiting, the limit is 2; try again in 1 seconds" in refusal.message


def test_a_request_that_can_never_run_is_refused_by_itself(start_loop: StartLoop) -> None:
    bench = start_loop()
    bench.channel.arrive((ALICE, submit("long", [1] * MAX_MODEL_LEN)))
    refusal = bench.channel.next_refusal()
    assert (refusal.request_id, refusal.error) == ("long", "InvalidRequestError")
    bench.channel.arrive((ALICE, submit("short")))
    assert bench.tokens_of(ALICE, "short") == [4, 5, 6]


@pytest.mark.parametrize("end", [Abort(["a"]), FrontendLost()], ids=["aborted", "frontend lost"])
def test_requests_that_nobody_waits_for_end_silently_and_give_back_their_blocks(
    start_loop: StartLoop, end: Abort | FrontendLost
) -> None:
    bench = start_loop(paused=True)
    bench.channel.arrive((ALICE, submit("a", max_tokens=20)))
    bench.channel.arrive((BOB, submit("a", max_tokens=4)))
    bench.engine.run()
    bench.channel.arrive((ALICE, end))
    bench.engine.go_on()
    bench.loop.drain()
    assert bench.loop.statistics().free_blocks == NUM_BLOCKS - 1
    received = [message for batch in iter_now(bench.channel.sent) for message in batch]
    assert all(isinstance(message, StepTokens) for _, message in received)
    bobs = [message for frontend, message in received if frontend == BOB and isinstance(message, StepTokens)]
    assert [token for message in bobs for token in message.token_ids] == [4, 5, 6, 7]


def iter_now(
    waiting: queue.Queue[list[tuple[bytes, ToFrontend]]],
) -> Iterator[list[tuple[bytes, ToFrontend]]]:
    while not waiting.empty():
        yield waiting.get()


def test_an_abort_of_an_unknown_request_is_ignored(start_loop: StartLoop) -> None:
    bench = start_loop()
    bench.channel.arrive((ALICE, Abort(["never heard of"])), (ALICE, submit("a")))
    assert bench.tokens_of(ALICE, "a") == [4, 5, 6]


def test_draining_finishes_what_runs_and_refuses_what_comes(start_loop: StartLoop) -> None:
    bench = start_loop(paused=True)
    bench.channel.arrive((ALICE, submit("a", max_tokens=2)))
    bench.engine.run()
    drained = threading.Thread(target=bench.loop.drain)
    drained.start()
    while not bench.loop.statistics().draining:
        pass
    bench.channel.arrive((ALICE, submit("late")))
    assert bench.channel.next() == [(ALICE, StepTokens(["a"], [4], []))]
    assert drained.is_alive()
    bench.engine.run()
    messages = bench.channel.next() + bench.channel.next()
    assert (ALICE, StepTokens(["a"], [5], [Finished("a", "length")])) in messages
    [refusal] = [message for _, message in messages if isinstance(message, Refusal)]
    assert (refusal.request_id, refusal.error) == ("late", "OverloadedError")
    drained.join(PATIENCE_S)
    assert not drained.is_alive()


def test_when_the_engine_is_lost_requests_end_and_its_return_is_noticed(start_loop: StartLoop) -> None:
    bench = start_loop(paused=True)
    bench.channel.arrive((ALICE, submit("a")))
    bench.engine.die()
    assert bench.channel.next_refusal().error == "PeerLostError"
    bench.channel.arrive((ALICE, submit("b")))
    assert bench.channel.next_refusal() == Refusal("b", "PeerLostError", "the engine does not answer")
    bench.engine.go_on()
    bench.engine.present.set()
    request_ids = iter(range(1000))
    while isinstance(message := _answer(bench, f"c{next(request_ids)}"), Refusal):
        assert message.error == "PeerLostError"
    assert isinstance(message, StepTokens)
    assert message.token_ids == [4]
    assert bench.end.empty()


def _answer(bench: Bench, request_id: str) -> ToFrontend:
    bench.channel.arrive((ALICE, submit(request_id, max_tokens=1)))
    [(_, message)] = bench.channel.next()
    return message


def test_a_failed_step_costs_a_request_nothing(start_loop: StartLoop) -> None:
    bench = start_loop(paused=True)
    bench.channel.arrive((ALICE, submit("a", max_tokens=3)))
    step, _ = bench.engine.waiting.get(timeout=PATIENCE_S)
    bench.engine.go_on()
    step.outcome.put(EngineStepError("out of memory"))
    assert bench.tokens_of(ALICE, "a") == [4, 5, 6]
    assert bench.loop.statistics().failed_steps == 1
    assert bench.end.empty()


def test_when_the_engine_is_dead_every_request_is_told_and_the_server_ends(start_loop: StartLoop) -> None:
    bench = start_loop(max_num_seqs=1, paused=True)
    bench.channel.arrive((ALICE, submit("running")), (ALICE, submit("waiting")))
    bench.engine.run()
    bench.channel.next()
    step, _ = bench.engine.waiting.get(timeout=PATIENCE_S)
    bench.engine.dead = True
    step.outcome.put(EngineStepError("step 2 failed: cudaErrorIllegalAddress"))
    bench.assert_all_is_over("the GPU is lost: cudaErrorIllegalAddress", "running", "waiting")


def test_an_engine_that_stays_away_is_dead(start_loop: StartLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.serving.scheduler.step_loop.ENGINE_RETURN_S", -1.0)
    bench = start_loop(paused=True)
    bench.channel.arrive((ALICE, submit("a")))
    bench.engine.die()
    assert bench.channel.next_refusal() == Refusal("a", "PeerLostError", "the engine does not answer")
    bench.assert_all_is_over("the engine has been lost for 0 s: the engine does not answer")


def test_an_engine_that_has_not_been_there_yet_is_waited_for(
    start_loop: StartLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.serving.scheduler.step_loop.ENGINE_RETURN_S", -1.0)
    bench = start_loop(absent=True)
    for request_id in ("a", "b"):
        bench.channel.arrive((ALICE, submit(request_id)))
        refusal = bench.channel.next_refusal()
        assert refusal == Refusal(request_id, "PeerLostError", "the engine does not answer")
    bench.engine.present.set()
    request_ids = iter(range(1000))
    while isinstance(message := _answer(bench, f"c{next(request_ids)}"), Refusal):
        assert message.error == "PeerLostError"
    assert bench.end.empty()


@pytest.fixture
def gpu() -> fake_gpu.FakeDevice:
    return fake_gpu.FakeDevice()


def executor_on(gpu: fake_gpu.FakeDevice) -> TensorRTExecutor:
    limits = EngineLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=MAX_MODEL_LEN)
    kv_cache_bytes = NUM_BLOCKS * fake_gpu.KV_BYTES_PER_BLOCK
    engine = TensorRTEngine(fake_gpu.FakePlan(gpu), gpu, limits, kv_cache_bytes=kv_cache_bytes)
    return TensorRTExecutor(engine)


def test_a_cuda_error_that_stays_ends_the_server(start_loop: StartLoop, gpu: fake_gpu.FakeDevice) -> None:
    bench = start_loop(executor=executor_on(gpu))
    gpu.held = True
    bench.channel.arrive((ALICE, submit("a")), (BOB, submit("b")))
    gpu.error = "cudaEventQuery failed with cudaErrorIllegalAddress"
    bench.assert_all_is_over(f"the GPU is lost: {gpu.error}", "a", "b")


def test_a_gpu_that_does_not_come_back_after_the_step_timeout_ends_the_server(
    start_loop: StartLoop, gpu: fake_gpu.FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "engine_core.ENGINE_PATIENCE_S",
        "serving.scheduler.step_loop.ENGINE_PATIENCE_S",
        "execution.tensorrt.executor.CLOSE_TIMEOUT_S",
    ):
        monkeypatch.setattr(f"quire.{name}", 0.0)
    monkeypatch.setattr("quire.serving.scheduler.step_loop.ENGINE_RETURN_S", -1.0)
    bench = start_loop(executor=executor_on(gpu), step_timeout_s=0)
    gpu.held = True
    bench.channel.arrive((ALICE, submit("a")))
    silence = "the engine still computes a step after 0 s"
    assert bench.channel.next_refusal() == Refusal("a", "PeerLostError", silence)
    bench.assert_all_is_over(f"the engine has been lost for 0 s: {silence}")


def test_steps_that_cannot_be_launched_do_not_end_the_server(
    start_loop: StartLoop, gpu: fake_gpu.FakeDevice
) -> None:
    bench = start_loop(executor=executor_on(gpu))
    gpu.launch_error = "cudaGraphLaunch failed with cudaErrorInvalidValue"
    bench.channel.arrive((ALICE, submit("a", [1] * 6)))
    assert "failed 3 steps in a row: step 3 cannot be run" in bench.channel.next_refusal().message
    gpu.launch_error = ""
    bench.channel.arrive((ALICE, submit("b", [1] * 6, max_tokens=1)))
    assert bench.tokens_of(ALICE, "b") == [fake_gpu.next_token([1] * 6)]
    assert bench.end.empty()


def test_a_mistake_in_the_scheduler_ends_its_requests_and_the_loop_goes_on(
    start_loop: StartLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = start_loop()
    with monkeypatch.context() as patched:
        patched.setattr(Scheduler, "schedule", lambda self: 1 / 0)
        bench.channel.arrive((ALICE, submit("a")))
        refusal = bench.channel.next_refusal()
        assert (refusal.request_id, refusal.error) == ("a", "EngineStepError")
    bench.channel.arrive((ALICE, submit("b")))
    assert bench.tokens_of(ALICE, "b") == [4, 5, 6]


def test_stopping_ends_every_request_while_a_step_is_under_way(start_loop: StartLoop) -> None:
    bench = start_loop(max_num_seqs=1, paused=True)
    bench.channel.arrive((ALICE, submit("running")), (ALICE, submit("waiting")))
    bench.engine.run()
    bench.channel.next()
    bench.loop.stop()
    refusals = bench.channel.next()
    assert [message.request_id for _, message in refusals if isinstance(message, Refusal)] == [
        "running",
        "waiting",
    ]
    assert "quire-step-loop" not in {thread.name for thread in threading.enumerate()}
    bench.loop.drain()  # answers, rather than wait for a loop that has ended
