"""Whatever arrives, is aborted or fails: no request and no block is lost, and no token is computed wrongly.

The machine runs the scheduler on a pool that remembers, for every slot, which prefix was computed there. A
step writes its slots first and then reads each request's whole context through its block table, so a block
that was shared, freed or found again when it must not be shows up as a slot with another prefix.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig
from quire.scheduling.scheduler_output import SchedulerOutput

STOP_TOKEN = 0
VOCABULARY = 12

CONFIGS = st.builds(
    SchedulerConfig,
    num_blocks=st.sampled_from([3, 5, 9, 14, 20]),
    block_size=st.sampled_from([2, 4, 16, 32]),
    max_num_batched_tokens=st.sampled_from([1, 8, 12, 40, 200]),
    max_num_seqs=st.integers(1, 8),
    max_model_len=st.sampled_from([12, 70]),
    policy=st.sampled_from(["fcfs", "priority"]),
    enable_prefix_caching=st.booleans(),
    long_prefill_token_threshold=st.sampled_from([0, 0, 3, 8]),
    async_scheduling=st.booleans(),
)


def next_token(token_ids: list[int], salt: str | None) -> int:
    """The model: a token that depends on the whole context."""
    return hashlib.sha256(f"{salt}{token_ids}".encode()).digest()[0] % VOCABULARY


@dataclass
class Step:
    """A step to be run, with the block tables as they were when it was scheduled."""

    output: SchedulerOutput
    tables: dict[str, list[int]]


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, aborts, steps and pool losses in any order, on a pool that remembers what was written where."""

    @initialize(config=CONFIGS)
    def make(self, config: SchedulerConfig) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.submitted: dict[str, Request] = {}
        self.endings: Counter[str] = Counter()
        self.slots: dict[tuple[int, int], tuple[str | None, list[int]]] = {}
        self.tables: dict[str, list[int]] = {}
        self.in_flight: Step | None = None

    @rule(
        shared=st.sampled_from([0, 4, 9, 16, 32]),
        own=st.lists(st.integers(1, 3), max_size=5),
        max_tokens=st.integers(1, 30),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "salt"]),
    )
    def add(self, shared: int, own: list[int], max_tokens: int, priority: int, salt: str | None) -> None:
        longest = min(self.config.max_model_len, (self.config.num_blocks - 1) * self.config.block_size + 1)
        max_tokens = min(max_tokens, longest - 1)
        prompt = ([1 + position % 5 for position in range(shared)] + own or [1])[: longest - max_tokens]
        number = len(self.submitted)
        parameters = SamplingParams(max_tokens=max_tokens, stop_token_ids=(STOP_TOKEN,))
        request = Request(f"r{number}", prompt, parameters, priority, number, salt)
        self.scheduler.check_request(request)
        self.scheduler.add_request(request)
        self.submitted[request.request_id] = request
        self.scheduler.check_integrity()

    @precondition(lambda self: self.submitted)
    @rule(data=st.data(), fail=st.booleans())
    def end(self, data: st.DataObject, fail: bool) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.submitted)), min_size=1, max_size=3))
        ended = (self.scheduler.fail_requests if fail else self.scheduler.abort_requests)(names)
        self.endings.update(request.request_id for request in ended)
        self.scheduler.check_integrity()

    @rule()
    def step(self) -> None:
        self.take_step()

    @rule(count=st.integers(2, 12))
    def several_steps(self, count: int) -> None:
        for _ in range(count):
            self.take_step()

    @rule()
    def lose_pool(self) -> None:
        self.scheduler.reset_after_pool_loss()
        self.in_flight = None
        self.slots.clear()
        self.scheduler.check_integrity()

    def take_step(self) -> None:
        """Schedule a step; run and update the oldest one that has to be."""
        scheduled = self.scheduler.schedule()
        self.scheduler.check_integrity()
        assert all(count > 0 for count in scheduled.num_scheduled_tokens)
        assert sum(scheduled.num_scheduled_tokens) == scheduled.total_num_scheduled_tokens
        assert scheduled.total_num_scheduled_tokens <= self.config.max_num_batched_tokens
        for request_id in scheduled.finished_request_ids:
            self.tables.pop(request_id, None)
        for request in (*scheduled.preempted_requests, *scheduled.new_requests):
            self.tables[request.request_id] = []
        for request_id, block_ids in scheduled.new_block_ids.items():
            self.tables[request_id] += block_ids
        upcoming = None
        if scheduled.requests:
            names = [request.request_id for request in scheduled.requests]
            upcoming = Step(scheduled, {name: list(self.tables[name]) for name in names})
        if self.config.async_scheduling:
            due, self.in_flight = self.in_flight, upcoming
        else:
            due = upcoming
        if due is not None:
            for output in self.scheduler.update_from_output(due.output, self.run(due)):
                if output.finish_reason is not None:
                    self.endings[output.request.request_id] += 1
            self.scheduler.check_integrity()

    def run(self, step: Step) -> list[int]:
        """Write every slot of the step, then read the contexts back; tokens in flight are known by now."""
        block_size, output, tables = self.config.block_size, step.output, step.tables
        ends = []
        for request, count, first in zip(
            output.requests, output.num_scheduled_tokens, output.num_computed_tokens, strict=True
        ):
            table, end = tables[request.request_id], first + count
            ends.append(end)
            for position in range(first, end):
                slot = table[position // block_size], position % block_size
                self.slots[slot] = (request.cache_salt, request.all_token_ids[: position + 1])
        sampled = []
        for index, (request, end) in enumerate(zip(output.requests, ends, strict=True)):
            table = tables[request.request_id]
            if request.finished:  # What is computed for it is thrown away.
                sampled += [STOP_TOKEN] * (index in output.sampling)
                continue
            for position in range(end):
                slot = table[position // block_size], position % block_size
                assert self.slots[slot] == (request.cache_salt, request.all_token_ids[: position + 1])
            if index in output.sampling:
                assert end == len(request.all_token_ids), "a token is sampled where the context ends"
                sampled.append(next_token(request.all_token_ids, request.cache_salt))
        return sampled

    def teardown(self) -> None:
        """Left alone, every request ends, exactly once, with the tokens that it would get alone."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5_000):
            if not self.scheduler.has_unfinished_requests() and self.in_flight is None:
                break
            self.take_step()
        assert self.endings == Counter(self.submitted.keys())
        assert self.scheduler.num_free_blocks == self.config.num_blocks - 1
        for request in self.submitted.values():
            token_ids = request.all_token_ids
            for length in range(request.num_prompt_tokens, len(token_ids)):
                assert token_ids[length] == next_token(token_ids[:length], request.cache_salt)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=300, stateful_step_count=25, deadline=None)
