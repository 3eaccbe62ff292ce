from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from quire.engine_core import MAX_FAILED_STEPS, EngineCore
from quire.errors import EngineStepError, PeerLostError
from quire.execution.executor import PoolInfo, StepOutput
from quire.execution.model_inputs import ModelInputs
from quire.execution.sampler import Sampler
from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig
from quire.scheduling.scheduler_output import RequestOutput, SchedulerOutput

VOCAB_SIZE = 50


class CountingExecutor:
    """Answers every token t with t + 1; notes what happens in which order."""

    max_in_flight = 1
    token_feedback = False

    def __init__(self, pool: PoolInfo) -> None:
        self.pool = pool
        self.events: list[str] = []
        self.failing: Exception | None = None
        self.failing_pool_info: Exception | None = None
        self.broken_logits = False

    def pool_info(self, timeout_s: float) -> PoolInfo:
        if self.failing_pool_info:
            raise self.failing_pool_info
        return self.pool

    def submit(self, inputs: ModelInputs) -> CountingStep:
        self.events.append(f"submit {inputs.step}")
        return CountingStep(self, inputs)

    def close(self) -> None:
        pass


class CountingStep:
    def __init__(self, executor: CountingExecutor, inputs: ModelInputs) -> None:
        self._executor = executor
        self._inputs = inputs

    def result(self, timeout_s: float) -> StepOutput:
        self._executor.events.append(f"result {self._inputs.step}")
        if self._executor.failing:
            raise self._executor.failing
        next_ids = (self._inputs.input_ids[self._inputs.logits_indices] + 1) % VOCAB_SIZE
        logits = np.eye(VOCAB_SIZE, dtype=np.float32)[next_ids]
        return StepOutput(
            np.full_like(logits, np.nan) if self._executor.broken_logits else logits,
            None,
            self._executor.pool,
        )


class NotingScheduler(Scheduler):
    """Notes its calls among the executor's events."""

    def __init__(self, config: SchedulerConfig, events: list[str]) -> None:
        super().__init__(config)
        self._events = events

    def schedule(self) -> SchedulerOutput:
        self._events.append("schedule")
        return super().schedule()

    def update_from_output(
        self, output: SchedulerOutput, sampled_token_ids: Sequence[int]
    ) -> list[RequestOutput]:
        self._events.append("update")
        return super().update_from_output(output, sampled_token_ids)


def make_core(*, overlap: bool, num_blocks: int = 20) -> tuple[EngineCore, CountingExecutor]:
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=4,
        max_num_batched_tokens=16,
        max_num_seqs=4,
        max_model_len=40,
        async_scheduling=overlap,
    )
    executor = CountingExecutor(PoolInfo(num_blocks, epoch=5))
    return EngineCore(
        NotingScheduler(config, executor.events), executor, Sampler(), step_timeout_s=9
    ), executor


def greedy(request_id: str, prompt: list[int], max_tokens: int = 3) -> Request:
    return Request(request_id, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0))


def run_to_end(core: EngineCore) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while core.has_work:
        for output in core.step().outputs:
            tokens.setdefault(output.request.request_id, []).append(output.token_id)
    return tokens


def test_a_plain_turn_takes_one_step_through_all_six_stations() -> None:
    core, executor = make_core(overlap=False)
    core.add_request(greedy("a", [7]))
    assert [output.token_id for output in core.step().outputs] == [8]
    assert executor.events == ["schedule", "submit 1", "result 1", "update"]


def test_an_overlapped_turn_schedules_the_next_step_before_it_waits_for_the_one_under_way() -> None:
    core, executor = make_core(overlap=True)
    core.add_request(greedy("a", [7]))
    assert core.step().outputs == []
    assert [output.token_id for output in core.step().outputs] == [8]
    assert executor.events == ["schedule", "submit 1", "schedule", "result 1", "submit 2", "update"]


@pytest.mark.parametrize("overlap", [False, True])
def test_all_requests_get_their_tokens_and_then_there_is_no_work(overlap: bool) -> None:
    core, _ = make_core(overlap=overlap)
    for request in (greedy("a", [7]), greedy("b", [1, 2, 3], 2), greedy("c", list(range(20)), 4)):
        core.add_request(request)
    assert run_to_end(core) == {"a": [8, 9, 10], "b": [4, 5], "c": [20, 21, 22, 23]}
    assert core.step().outputs == []
    assert core.statistics.sampled_tokens == 9


@pytest.mark.parametrize("overlap", [False, True])
def test_rows_of_requests_that_end_while_nothing_runs_are_used_again(overlap: bool) -> None:
    core, _ = make_core(overlap=overlap)
    for turn in range(12):
        core.add_request(greedy(str(turn), [turn], 1))
        assert run_to_end(core) == {str(turn): [turn + 1]}


@pytest.mark.parametrize("overlap", [False, True])
def test_an_aborted_request_brings_no_further_token_and_gives_its_blocks_back(overlap: bool) -> None:
    core, _ = make_core(overlap=overlap)
    core.add_request(greedy("a", [1] * 9, 20))
    core.add_request(greedy("b", [5], 4))
    core.step()
    core.abort_requests(["a", "unknown"])
    assert run_to_end(core).get("a") is None
    assert core.scheduler.num_free_blocks == 19


@pytest.mark.parametrize("overlap", [False, True])
def test_logits_that_are_not_numbers_fail_the_requests_after_a_few_tries(overlap: bool) -> None:
    core, executor = make_core(overlap=overlap)
    executor.broken_logits = True
    core.add_request(greedy("a", [7]))
    failures = []
    while core.has_work:
        failures += core.step().failures
    assert [request_id for request_id, _ in failures] == ["a"]
    assert isinstance(failures[0][1], EngineStepError)
    assert core.statistics.failed_steps == MAX_FAILED_STEPS


@pytest.mark.parametrize("overlap", [False, True])
def test_a_token_gained_starts_the_count_of_failed_steps_anew(overlap: bool) -> None:
    core, executor = make_core(overlap=overlap)
    core.add_request(greedy("a", [7], 4))
    tokens: list[int] = []
    while core.has_work:
        for _ in range(MAX_FAILED_STEPS - 1):
            executor.failing = EngineStepError("for a while")
            failed_before = core.statistics.failed_steps
            while core.has_work and core.statistics.failed_steps == failed_before:
                assert not core.step().failures
        executor.failing = None
        num_tokens = len(tokens)
        while core.has_work and len(tokens) == num_tokens:
            tokens += [output.token_id for output in core.step().outputs]
    assert tokens == [8, 9, 10, 11]


@pytest.mark.parametrize("overlap", [False, True])
def test_an_engine_that_does_not_come_back_is_told_to_the_caller(overlap: bool) -> None:
    core, executor = make_core(overlap=overlap)
    core.add_request(greedy("a", [7]))
    executor.failing = executor.failing_pool_info = PeerLostError("gone")
    with pytest.raises(PeerLostError, match="gone"):
        run_to_end(core)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_engine_that_comes_back_with_another_pool_is_told_to_the_caller(overlap: bool) -> None:
    core, executor = make_core(overlap=overlap)
    core.add_request(greedy("a", [7]))
    core.step()
    executor.pool = PoolInfo(10, epoch=6)
    with pytest.raises(PeerLostError, match="another size"):
        run_to_end(core)
