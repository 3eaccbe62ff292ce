from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.unit.strict_executor import AHEAD, MODES, OVERLAPPED, PLAIN, Mode, StrictExecutor, StrictStep

from quire.engine_core import MAX_FAILED_STEPS, EngineCore
from quire.errors import EngineStepError, PeerLostError, QuireError
from quire.execution.executor import PoolInfo
from quire.execution.manifest import EngineLimits
from quire.execution.model_inputs import InputsCheck, ModelInputs
from quire.execution.sampler import Sampler
from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig
from quire.scheduling.scheduler_output import RequestOutput, SchedulerOutput

VOCAB_SIZE = 50


class CountingExecutor(StrictExecutor):
    """Answers every token t with t + 1; notes what happens in which order."""

    def __init__(self, mode: Mode, config: SchedulerConfig) -> None:
        limits = EngineLimits(config.max_num_seqs, config.max_num_batched_tokens, config.max_model_len)
        check = InputsCheck(VOCAB_SIZE, config.block_size, config.num_blocks, limits)
        super().__init__(mode, check, PoolInfo(config.num_blocks, epoch=5))
        self.events: list[str] = []
        self.refusing: Exception | None = None
        self.failing: Exception | None = None
        self.failing_pool_info: Exception | None = None
        self.broken_token: int | None = None
        """The row that ends with this token has no usable logits."""

    def pool_info(self, timeout_s: float) -> PoolInfo:
        if self.failing_pool_info:
            raise self.failing_pool_info
        return super().pool_info(timeout_s)

    def submit(self, inputs: ModelInputs) -> StrictStep:
        self.events.append(f"submit {inputs.step}")
        if self.refusing:
            raise self.refusing
        return super().submit(inputs)

    def compute(self, inputs: ModelInputs) -> NDArray[np.float32]:
        self.events.append(f"result {inputs.step}")
        if self.failing:
            raise self.failing
        last_ids = inputs.input_ids[inputs.logits_indices]
        logits: NDArray[np.float32] = np.eye(VOCAB_SIZE, dtype=np.float32)[(last_ids + 1) % VOCAB_SIZE]
        logits[last_ids == self.broken_token] = np.nan
        return logits


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


def make_core(mode: Mode, num_blocks: int = 20) -> tuple[EngineCore, CountingExecutor]:
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=4,
        max_num_batched_tokens=16,
        max_num_seqs=4,
        max_model_len=40,
        async_scheduling=mode.overlap,
    )
    executor = CountingExecutor(mode, config)
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
    core, executor = make_core(PLAIN)
    core.add_request(greedy("a", [7]))
    assert [output.token_id for output in core.step().outputs] == [8]
    assert executor.events == ["schedule", "submit 1", "result 1", "update"]


def test_an_overlapped_turn_schedules_the_next_step_before_it_waits_for_the_one_under_way() -> None:
    core, executor = make_core(OVERLAPPED)
    core.add_request(greedy("a", [7]))
    assert core.step().outputs == []
    assert [output.token_id for output in core.step().outputs] == [8]
    assert executor.events == ["schedule", "submit 1", "schedule", "result 1", "submit 2", "update"]


def test_where_tokens_are_fed_back_the_next_step_is_submitted_before_the_one_under_way_is_collected() -> None:
    core, executor = make_core(AHEAD)
    core.add_request(greedy("a", [7]))
    assert core.step().outputs == []
    assert [output.token_id for output in core.step().outputs] == [8]
    assert [output.token_id for output in core.step().outputs] == [9]
    assert executor.events == [
        "schedule", "submit 1",
        "schedule", "submit 2", "result 1", "update",
        "schedule", "submit 3", "result 2", "update",
    ]  # fmt: skip


def test_a_request_that_is_certain_to_end_is_not_computed_again() -> None:
    core, executor = make_core(AHEAD)
    core.add_request(greedy("a", [7], 2))
    assert run_to_end(core) == {"a": [8, 9]}
    assert [event for event in executor.events if "submit" in event] == ["submit 1", "submit 2"]


def test_the_token_after_a_stop_token_is_thrown_away() -> None:
    core, executor = make_core(AHEAD)
    core.add_request(Request("a", [7], SamplingParams(max_tokens=9, temperature=0.0, stop_token_ids=(9,))))
    assert run_to_end(core) == {"a": [8, 9]}
    assert executor.events.count("submit 3") == 1
    assert core.scheduler.num_free_blocks == 19


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_all_requests_get_their_tokens_and_then_there_is_no_work(mode: Mode) -> None:
    core, _ = make_core(mode)
    for request in (greedy("a", [7]), greedy("b", [1, 2, 3], 2), greedy("c", list(range(20)), 4)):
        core.add_request(request)
    assert run_to_end(core) == {"a": [8, 9, 10], "b": [4, 5], "c": [20, 21, 22, 23]}
    assert core.step().outputs == []
    assert core.statistics.sampled_tokens == 9


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_rows_of_requests_that_end_while_nothing_runs_are_used_again(mode: Mode) -> None:
    core, _ = make_core(mode)
    for turn in range(12):
        core.add_request(greedy(str(turn), [turn], 1))
        assert run_to_end(core) == {str(turn): [turn + 1]}


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_aborted_request_brings_no_further_token_and_gives_its_blocks_back(mode: Mode) -> None:
    core, _ = make_core(mode)
    core.add_request(greedy("a", [1] * 9, 20))
    core.add_request(greedy("b", [5], 4))
    core.step()
    core.abort_requests(["a", "unknown"])
    assert run_to_end(core).get("a") is None
    assert core.scheduler.num_free_blocks == 19


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_logits_that_are_not_numbers_fail_the_requests_after_a_few_tries(mode: Mode) -> None:
    core, executor = make_core(mode)
    executor.broken_token = 7
    core.add_request(greedy("a", [7]))
    failures = []
    while core.has_work:
        failures += core.step().failures
    assert [request_id for request_id, _ in failures] == ["a"]
    assert isinstance(failures[0][1], EngineStepError)
    assert core.statistics.failed_steps == MAX_FAILED_STEPS


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_error_names_the_row_whose_logits_are_not_numbers(mode: Mode) -> None:
    core, executor = make_core(mode)
    executor.broken_token = 3
    core.add_request(greedy("a", [7], 9))
    core.add_request(greedy("b", [2], 9))
    failures: dict[str, QuireError] = {}
    while core.has_work:
        failures |= dict(core.step().failures)
    assert "the best logit of row 1 is" in str(failures["b"])


def test_of_two_steps_in_flight_both_are_lost_and_their_requests_go_on() -> None:
    core, executor = make_core(AHEAD)
    core.add_request(greedy("a", [7]))
    core.step()
    core.add_request(greedy("b", [20]))
    executor.failing = EngineStepError("once")
    assert core.step().outputs == []
    executor.failing = None
    assert core.scheduler.num_running == 0
    assert run_to_end(core) == {"a": [8, 9, 10], "b": [21, 22, 23]}
    assert core.statistics.failed_steps == 1


def test_a_failure_counts_for_the_requests_of_both_steps_in_flight() -> None:
    core, executor = make_core(AHEAD)
    executor.failing = EngineStepError("out of order")
    core.add_request(greedy("a", [7]))
    core.step()
    core.add_request(greedy("b", [20]))
    failed = []
    while core.has_work:
        failed += [(request_id, core.statistics.failed_steps) for request_id, _ in core.step().failures]
    assert failed == [("a", MAX_FAILED_STEPS), ("b", MAX_FAILED_STEPS)]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_step_that_is_refused_costs_no_token(mode: Mode) -> None:
    core, executor = make_core(mode)
    core.add_request(greedy("a", [7]))
    outputs = core.step().outputs
    executor.refusing = EngineStepError("not this one")
    outputs += core.step().outputs
    executor.refusing = None
    while core.has_work:
        outputs += core.step().outputs
    assert [output.token_id for output in outputs] == [8, 9, 10]
    assert core.statistics.failed_steps == 1


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_token_gained_starts_the_count_of_failed_steps_anew(mode: Mode) -> None:
    core, executor = make_core(mode)
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


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_engine_that_does_not_come_back_is_told_to_the_caller(mode: Mode) -> None:
    core, executor = make_core(mode)
    core.add_request(greedy("a", [7]))
    executor.failing = executor.failing_pool_info = PeerLostError("gone")
    with pytest.raises(PeerLostError, match="gone"):
        run_to_end(core)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_an_engine_that_comes_back_with_another_pool_is_told_to_the_caller(mode: Mode) -> None:
    core, executor = make_core(mode)
    core.add_request(greedy("a", [7]))
    core.step()
    executor.pool = PoolInfo(10, epoch=6)
    with pytest.raises(PeerLostError, match="another size"):
        run_to_end(core)
