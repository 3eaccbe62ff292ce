"""What the scheduler promises beyond the decisions that the recorded traces show."""

from __future__ import annotations

from typing import Any

import pytest

from quire.errors import InvalidRequestError
from quire.scheduling.request import Request, RequestStatus
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig
from quire.scheduling.scheduler_output import SchedulerOutput

STOP = 99


def make_scheduler(**changes: Any) -> Scheduler:
    defaults: dict[str, Any] = {
        "num_blocks": 17,
        "block_size": 4,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 4,
        "max_model_len": 64,
    }
    return Scheduler(SchedulerConfig(**(defaults | changes)))


def add(
    scheduler: Scheduler,
    name: str,
    prompt_length: int,
    max_tokens: int = 8,
    *,
    first: int = 0,
    **changes: Any,
) -> Request:
    parameters = SamplingParams(max_tokens=max_tokens, stop_token_ids=(STOP,))
    request = Request(name, list(range(first, first + prompt_length)), parameters, **changes)
    scheduler.add_request(request)
    return request


def update(scheduler: Scheduler, step: SchedulerOutput, token_id: int = 1) -> list[tuple[str, str | None]]:
    """Give every sampling request of a step the same token; returns ids and finish reasons."""
    outputs = scheduler.update_from_output(step, [token_id] * len(step.sampling))
    scheduler.check_integrity()
    return [(output.request.request_id, output.finish_reason) for output in outputs]


def names(requests: list[Request]) -> list[str]:
    return [request.request_id for request in requests]


def test_stop_token_ends_a_request_with_stop_and_belongs_to_its_output() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "a", 3)
    assert update(scheduler, scheduler.schedule(), 5) == [("a", None)]
    assert update(scheduler, scheduler.schedule(), STOP) == [("a", "stop")]
    assert request.all_token_ids == [0, 1, 2, 5, STOP]
    assert request.status is RequestStatus.FINISHED_STOPPED
    assert not scheduler.has_unfinished_requests()
    assert scheduler.num_free_blocks == 16
    assert scheduler.schedule().finished_request_ids == ["a"]


def test_stop_token_that_is_also_the_last_allowed_ends_with_stop() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 3, max_tokens=1)
    assert update(scheduler, scheduler.schedule(), STOP) == [("a", "stop")]


@pytest.mark.parametrize(("max_tokens", "max_model_len", "expected"), [(3, 64, 3), (50, 8, 5)])
@pytest.mark.parametrize("overlapped", [False, True])
def test_request_ends_with_length_at_max_tokens_or_max_model_len(
    max_tokens: int, max_model_len: int, expected: int, overlapped: bool
) -> None:
    scheduler = make_scheduler(max_model_len=max_model_len, async_scheduling=overlapped)
    request = add(scheduler, "a", 3, max_tokens=max_tokens)
    steps = [scheduler.schedule()] if overlapped else []
    num_computed = sum(step.total_num_scheduled_tokens for step in steps)
    endings = []
    while scheduler.has_unfinished_requests():
        steps.append(scheduler.schedule())
        num_computed += steps[-1].total_num_scheduled_tokens
        endings += update(scheduler, steps.pop(0))
    assert endings == [("a", None)] * (expected - 1) + [("a", "length")]
    assert request.num_output_tokens == expected
    assert num_computed == 3 + expected - 1, "no step was spent on a token that nobody gets"


def test_overlapped_token_of_a_request_that_stopped_is_thrown_away() -> None:
    scheduler = make_scheduler(async_scheduling=True)
    request = add(scheduler, "a", 3)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert names(second.requests) == ["a"]
    assert update(scheduler, first, STOP) == [("a", "stop")]
    assert update(scheduler, second) == []
    assert request.num_output_tokens == 1


def test_aborted_request_gets_nothing_more_and_its_blocks_are_free_at_once() -> None:
    scheduler = make_scheduler(async_scheduling=True)
    add(scheduler, "a", 3)
    add(scheduler, "b", 3, first=10)
    step = scheduler.schedule()
    assert names(scheduler.abort_requests(["a", "a", "unknown"])) == ["a"]
    assert scheduler.abort_requests(["a"]) == []
    assert scheduler.num_free_blocks == 15
    assert update(scheduler, step) == [("b", None)]


def test_failed_request_ends_wherever_it_is() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    running, waiting = add(scheduler, "a", 3), add(scheduler, "b", 3)
    update(scheduler, scheduler.schedule())
    assert scheduler.fail_requests(["b", "a"]) == [waiting, running]
    scheduler.check_integrity()
    assert running.status is waiting.status is RequestStatus.FINISHED_FAILED
    assert sorted(scheduler.schedule().finished_request_ids) == ["a", "b"]


def test_id_is_free_again_as_soon_as_its_request_has_ended() -> None:
    scheduler = make_scheduler(async_scheduling=True)
    add(scheduler, "a", 3)
    with pytest.raises(ValueError, match="'a' is in use"):
        add(scheduler, "a", 3)
    step = scheduler.schedule()
    scheduler.abort_requests(["a"])
    successor = add(scheduler, "a", 5)
    assert update(scheduler, step) == [], "the token of the aborted request is not its successor's"
    again = scheduler.schedule()
    assert again.finished_request_ids == ["a"]
    assert again.new_requests == [successor]


def test_preempted_request_gets_the_token_in_flight_and_goes_on_from_there() -> None:
    scheduler = make_scheduler(num_blocks=5, async_scheduling=True, enable_prefix_caching=False)
    add(scheduler, "a", 8)
    last = add(scheduler, "b", 7)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert names(second.preempted_requests) == ["b"]
    assert names(second.requests) == ["a"]
    assert update(scheduler, first) == [("a", None), ("b", None)]
    assert last.all_token_ids[7:] == [1]
    update(scheduler, second)
    scheduler.abort_requests(["a"])
    third = scheduler.schedule()
    assert third.resumed_requests == [last]
    assert third.num_scheduled_tokens == [8]
    assert len(third.new_block_ids["b"]) == 2


def test_pool_loss_forgets_the_cache_and_costs_no_request_its_tokens() -> None:
    scheduler = make_scheduler(async_scheduling=True)
    first, second = add(scheduler, "a", 8), add(scheduler, "b", 9, first=20)
    update(scheduler, scheduler.schedule())
    scheduler.schedule()
    scheduler.schedule()
    scheduler.reset_after_pool_loss()
    scheduler.check_integrity()
    assert scheduler.num_free_blocks == 16
    step = scheduler.schedule()
    assert {*names(step.preempted_requests)} == {"a", "b"}
    assert step.resumed_requests == [first, second]
    assert step.num_computed_tokens == [0, 0], "nothing of what was cached is found"
    assert step.num_scheduled_tokens == [9, 10], "prompt and the one token known"
    assert update(scheduler, step, 7) == [("a", None), ("b", None)]
    assert first.all_token_ids[8:] == [1, 7]


def test_cached_prompt_is_shared_but_for_the_block_of_its_last_token() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 8)
    add(scheduler, "b", 8)
    add(scheduler, "c", 8, cache_salt="other")
    step = scheduler.schedule()
    assert step.num_computed_tokens == [0, 4, 0], "b finds in the same step what a is about to write"
    assert step.new_block_ids["a"][0] == step.new_block_ids["b"][0]
    assert (scheduler.statistics.num_looked_up_tokens, scheduler.statistics.num_cached_tokens) == (24, 4)


def test_block_that_a_withdrawn_request_would_have_filled_is_not_found() -> None:
    """`low` is preempted by `high` after its chunk was scheduled in the same step; the chunk never runs."""
    scheduler = make_scheduler(
        num_blocks=9, max_num_batched_tokens=12, policy="priority", long_prefill_token_threshold=8
    )
    add(scheduler, "low", 31, max_tokens=2, priority=1)
    update(scheduler, scheduler.schedule())
    add(scheduler, "high", 4, max_tokens=2, first=50, arrival_order=1)
    update(scheduler, scheduler.schedule())
    step = scheduler.schedule()
    assert (names(step.requests), names(step.preempted_requests)) == (["high"], ["low"])
    assert update(scheduler, step) == [("high", "length")]
    resumed = scheduler.schedule()
    assert names(resumed.requests) == ["low"]
    assert resumed.num_computed_tokens == [20], "the tokens of the first two steps, not of the third"


def test_long_prompt_is_held_to_the_threshold_only_while_others_are_there() -> None:
    scheduler = make_scheduler(long_prefill_token_threshold=5)
    add(scheduler, "a", 20)
    alone = make_scheduler(long_prefill_token_threshold=5)
    add(alone, "a", 20)
    add(scheduler, "b", 20, first=30)
    assert alone.schedule().num_scheduled_tokens == [20]
    assert scheduler.schedule().num_scheduled_tokens == [5, 5]


def test_priority_decides_who_is_admitted_first_and_arrival_breaks_ties() -> None:
    scheduler = make_scheduler(policy="priority", max_num_seqs=2)
    for name, priority, arrival in (("c", 1, 0), ("b", 0, 2), ("a", 0, 1)):
        add(scheduler, name, 3, priority=priority, arrival_order=arrival)
    assert names(scheduler.schedule().requests) == ["a", "b"]
    assert names(list(scheduler.waiting_requests)) == ["c"]


@pytest.mark.parametrize(
    ("prompt_length", "max_tokens", "reason"),
    [(0, 1, "at least 1"), (64, 1, "max_model_len, 64"), (30, 9, "KV cache holds 36")],
)
def test_request_that_could_never_end_is_refused(prompt_length: int, max_tokens: int, reason: str) -> None:
    scheduler = make_scheduler(num_blocks=10)
    parameters = SamplingParams(max_tokens=max_tokens)
    with pytest.raises(InvalidRequestError, match=reason):
        scheduler.check_request(Request("a", [1] * prompt_length, parameters))


def test_largest_request_that_fits_the_pool_runs_to_its_end() -> None:
    scheduler = make_scheduler(num_blocks=10)
    request = add(scheduler, "a", 29, max_tokens=8)
    scheduler.check_request(request)
    for _ in range(8):
        ending = update(scheduler, scheduler.schedule())
    assert ending == [("a", "length")]


def test_steps_out_of_turn_are_refused() -> None:
    scheduler = make_scheduler()
    add(scheduler, "a", 3)
    step = scheduler.schedule()
    with pytest.raises(RuntimeError, match="in flight"):
        scheduler.schedule()
    with pytest.raises(ValueError, match="2 tokens for 1"):
        scheduler.update_from_output(step, [1, 2])
    update(scheduler, step)
    with pytest.raises(RuntimeError, match="oldest"):
        scheduler.update_from_output(step, [1])


def test_integrity_check_notices_a_lost_request_and_a_wrong_name() -> None:
    scheduler = make_scheduler()
    request = add(scheduler, "a", 8)
    step = scheduler.schedule()
    request.blocks[0].block_hash, kept = None, request.blocks[0].block_hash
    with pytest.raises(AssertionError, match="hash"):
        scheduler.check_integrity()
    request.blocks[0].block_hash = kept
    update(scheduler, step)
    request.status = RequestStatus.WAITING
    with pytest.raises(AssertionError, match="runs as"):
        scheduler.check_integrity()
