"""The scheduler: decides, step by step, which tokens of which requests are computed next.

There are no prefill and decode phases. Every request has tokens that are known or about to be, and tokens
that are computed; a step gives each running request the difference, within one token budget, and what is
left of the budget goes to waiting requests. When blocks run out, a running request gives way and is
computed again later. The decisions are vLLM's, block for block (tests/parity replays its traces); where
blocks are and what can be shared is the KV cache manager's business, running a step the executor's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from quire.errors import InvalidRequestError
from quire.scheduling.block_pool import Block
from quire.scheduling.kv_cache_manager import KVCacheManager
from quire.scheduling.request import FinishReason, Request, RequestStatus
from quire.scheduling.scheduler_output import RequestOutput, SchedulerOutput
from quire.scheduling.waiting_queue import WaitingQueue

Policy = Literal["fcfs", "priority"]


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits and policy of one scheduler; sizes are in tokens unless they say otherwise."""

    num_blocks: int
    """Blocks in the KV pool, the null block included."""
    block_size: int
    max_num_batched_tokens: int
    """Tokens computed in one step, over all requests."""
    max_num_seqs: int
    """Requests that run at the same time."""
    max_model_len: int
    """Prompt and output of one request."""
    policy: Policy = "fcfs"
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = 0
    """Most tokens that one request gets in one step while there are others; 0 for no such limit."""
    async_scheduling: bool = False
    """Whether a step is scheduled before the sampled tokens of the step before are known."""


@dataclass(slots=True)
class SchedulerStatistics:
    """What happened since the start."""

    num_preemptions: int = 0
    num_looked_up_tokens: int = 0
    """Known tokens of admitted requests, looked up in the prefix cache."""
    num_cached_tokens: int = 0
    """Those of them that were found there."""


class Scheduler:
    """Requests, from `add_request` to the one output or call that ends each.

    Plain scheduling alternates `schedule()` and `update_from_output()`. With `async_scheduling`, step k+1
    is scheduled before step k is updated: a token that step k is going to sample is counted on before it
    is known. A request that is certain to end with it (by max_tokens or max_model_len) is not scheduled
    again; one that turns out to have ended (by a stop token, or aborted) has its token of step k+1 thrown
    away. A preempted request still gets the token that a step in flight sampled for it.

    Every step that `schedule()` returned must be executed in full and in order, even where requests in it
    have ended meanwhile; `KVCacheManager` says why blocks may then be freed while a step is in flight.
    A step that cannot be is answered with `reset_after_pool_loss()`.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.kv_cache = KVCacheManager(config.num_blocks, config.block_size, config.enable_prefix_caching)
        self.statistics = SchedulerStatistics()
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []
        self._waiting = WaitingQueue(by_priority=config.policy == "priority")
        self._in_flight: deque[SchedulerOutput] = deque()
        # What the next step's receiver has to hear: it keeps rows for requests.
        self._finished_request_ids: list[str] = []
        self._preempted_by_reset: list[Request] = []

    # Requests come and go.

    def check_request(self, request: Request) -> None:
        """Refuse a request that could never run to its end.

        Raises:
            InvalidRequestError: its prompt leaves no room for output, or the pool could not hold it alone.
        """
        config = self.config
        if not 0 < request.num_prompt_tokens < config.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {request.num_prompt_tokens} tokens; it must have at least 1 and, "
                f"to leave room for output, fewer than max_model_len, {config.max_model_len}"
            )
        # The last token is sampled, but never computed.
        longest = min(request.max_num_tokens, config.max_model_len) - 1
        capacity = (config.num_blocks - 1) * config.block_size
        if longest > capacity:
            raise InvalidRequestError(
                f"prompt and max_tokens come to {longest + 1} tokens, but the KV cache holds {capacity}; "
                f"ask for fewer tokens or give the server a larger KV cache"
            )

    def add_request(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: a request of the same id has not ended.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is in use")
        request.max_num_tokens = min(request.max_num_tokens, self.config.max_model_len)
        self.kv_cache.register(request)
        self._requests[request.request_id] = request
        self._waiting.add(request)

    def abort_requests(self, request_ids: Iterable[str]) -> list[Request]:
        """End requests whose outcome nobody waits for; returns those that had not ended yet."""
        return self._end_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def fail_requests(self, request_ids: Iterable[str]) -> list[Request]:
        """End requests that cannot go on; returns those that had not ended yet."""
        return self._end_requests(request_ids, RequestStatus.FINISHED_FAILED)

    def _end_requests(self, request_ids: Iterable[str], status: RequestStatus) -> list[Request]:
        ended: list[Request] = []
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._finish(request, status)
                ended.append(request)
        if ended:
            self._drop_finished()
        return ended

    def _finish(self, request: Request, status: RequestStatus) -> None:
        request.status = status
        self.kv_cache.free(request)
        self._finished_request_ids.append(request.request_id)
        del self._requests[request.request_id]

    def _drop_finished(self) -> None:
        self._running = [request for request in self._running if not request.finished]
        self._waiting.drop_finished()

    # A step is decided.

    def schedule(self) -> SchedulerOutput:
        """Decide the next step.

        Raises:
            RuntimeError: more steps are in flight than the way of scheduling allows.
        """
        if len(self._in_flight) >= (2 if self.config.async_scheduling else 1):
            raise RuntimeError(f"{len(self._in_flight)} steps are in flight; update the oldest first")
        output = SchedulerOutput(
            finished_request_ids=self._finished_request_ids, preempted_requests=self._preempted_by_reset
        )
        self._finished_request_ids, self._preempted_by_reset = [], []
        num_preempted_before = len(output.preempted_requests)
        most_tokens = self._most_tokens_per_request()
        budget = self._schedule_running(output, most_tokens)
        if len(output.preempted_requests) == num_preempted_before:
            # Nobody had to give way in this step, so there may be room for more.
            budget = self._schedule_waiting(output, budget, most_tokens)
        output.total_num_scheduled_tokens = self.config.max_num_batched_tokens - budget
        self._count_on(output)
        if output.requests:
            self._in_flight.append(output)
        return output

    def _most_tokens_per_request(self) -> int:
        """What one request may get of a step: all of it, if it is alone or no threshold is set."""
        threshold = self.config.long_prefill_token_threshold
        if threshold and len(self._running) + len(self._waiting) > 1:
            return threshold
        return self.config.max_num_batched_tokens

    def _schedule_running(self, output: SchedulerOutput, most_tokens: int) -> int:
        """Give running requests the tokens they lack, in order of admission; returns the budget left."""
        requests, num_scheduled, num_computed = (
            output.requests,
            output.num_scheduled_tokens,
            output.num_computed_tokens,
        )
        budget = self.config.max_num_batched_tokens
        for request in self._running.copy():
            if not budget:
                break
            if request.status is not RequestStatus.RUNNING:
                continue  # It gave way to one before it.
            computed = request.num_computed_tokens
            num_new = request.num_expected_tokens - computed
            if num_new == 1:
                if request.num_expected_tokens >= request.max_num_tokens:
                    continue  # The token in flight is its last.
            else:
                num_new = min(num_new, most_tokens, budget)
            if computed + num_new >= request.table_due_at:
                new_blocks = self.kv_cache.grow(request, computed + num_new)
                if new_blocks is None:
                    new_blocks = self._grow_by_preempting(request, computed + num_new, output)
                    budget = self.config.max_num_batched_tokens - sum(num_scheduled)
                    if new_blocks is None:
                        continue
                if new_blocks:
                    output.new_block_ids[request.request_id] = [block.block_id for block in new_blocks]
            requests.append(request)
            num_scheduled.append(num_new)
            num_computed.append(computed)
            budget -= num_new
        return budget

    def _schedule_waiting(self, output: SchedulerOutput, budget: int, most_tokens: int) -> int:
        """Admit waiting requests while budget, seats and blocks last; returns the budget left."""
        running, waiting, kv_cache = self._running, self._waiting, self.kv_cache
        while budget and waiting and len(running) < self.config.max_num_seqs:
            request = waiting.peek()
            cached_prefix = kv_cache.find_cached_prefix(request)
            num_computed = len(cached_prefix) * kv_cache.block_size
            num_known = len(request.all_token_ids)
            num_new = min(num_known - num_computed, most_tokens, budget)
            if not kv_cache.admit(request, cached_prefix, num_computed + num_new):
                break
            running.append(waiting.pop())
            first_time = request.status is RequestStatus.WAITING
            (output.new_requests if first_time else output.resumed_requests).append(request)
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = num_computed
            self.statistics.num_looked_up_tokens += num_known
            self.statistics.num_cached_tokens += num_computed
            output.new_block_ids[request.request_id] = [block.block_id for block in request.blocks]
            output.requests.append(request)
            output.num_scheduled_tokens.append(num_new)
            output.num_computed_tokens.append(num_computed)
            budget -= num_new
        return budget

    def _count_on(self, output: SchedulerOutput) -> None:
        """Advance the requests of a step that is decided, as if it had run; see who samples in it."""
        sampling = output.sampling
        for index, request in enumerate(output.requests):
            computed = request.num_computed_tokens + output.num_scheduled_tokens[index]
            request.num_computed_tokens = computed
            if computed == request.num_expected_tokens:
                request.num_expected_tokens = computed + 1
                sampling.append(index)

    # Blocks run out.

    def _grow_by_preempting(
        self, request: Request, num_tokens: int, output: SchedulerOutput
    ) -> list[Block] | None:
        """Preempt until the table of `request` can hold `num_tokens`; None if it gave way itself."""
        while (new_blocks := self.kv_cache.grow(request, num_tokens)) is None:
            victim = self._choose_victim()
            if victim in output.requests:
                self._withdraw(victim, output)
            self._preempt(victim)
            output.preempted_requests.append(victim)
            if victim is request:
                return None
        return new_blocks

    def _choose_victim(self) -> Request:
        """The running request that was admitted last or, by priority, the least important one."""
        if self.config.policy == "fcfs":
            return self._running[-1]
        return max(self._running, key=lambda request: (request.priority, request.arrival_order))

    def _withdraw(self, request: Request, output: SchedulerOutput) -> None:
        """Take a request out of the step that is being decided."""
        index = output.requests.index(request)
        for column in (output.requests, output.num_scheduled_tokens, output.num_computed_tokens):
            del column[index]
        output.new_block_ids.pop(request.request_id, None)
        self.kv_cache.free_unwritten(request)

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks and queue it again; its tokens stay known."""
        self._running.remove(request)
        self.kv_cache.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_expected_tokens = len(request.all_token_ids)
        request.num_preemptions += 1
        self.statistics.num_preemptions += 1
        self._waiting.put_back(request)

    def reset_after_pool_loss(self) -> None:
        """Start over with a pool whose contents are lost or unknown.

        The prefix cache is forgotten and every running request preempted; steps in flight are dropped,
        and `update_from_output` must not be called for them. No request ends by this.
        """
        self._in_flight.clear()
        for request in reversed(self._running.copy()):
            self._preempt(request)
            self._preempted_by_reset.append(request)
        self.kv_cache.forget_prefixes()

    # A step has run.

    def update_from_output(
        self, output: SchedulerOutput, sampled_token_ids: Sequence[int]
    ) -> list[RequestOutput]:
        """Take in the tokens that the oldest step in flight sampled.

        Args:
            output: the step.
            sampled_token_ids: one for each entry of `output.sampling`.

        Returns:
            One output for each of them whose request has not ended meanwhile, in batch order.

        Raises:
            RuntimeError: `output` is not the oldest step in flight.
            ValueError: there are more or fewer tokens than the step samples.
        """
        if not output.requests:
            return []
        if not self._in_flight or self._in_flight[0] is not output:
            raise RuntimeError("only the oldest step in flight can be updated")
        if len(sampled_token_ids) != len(output.sampling):
            raise ValueError(f"{len(sampled_token_ids)} tokens for {len(output.sampling)} sampling requests")
        self._in_flight.popleft()
        request_outputs: list[RequestOutput] = []
        any_finished = False
        requests = output.requests
        for index, token_id in zip(output.sampling, sampled_token_ids, strict=True):
            request = requests[index]
            token_ids = request.all_token_ids
            if request.status is RequestStatus.RUNNING:
                if len(token_ids) >= request.table_due_at:
                    # All tokens known so far are computed now; the block that they fill has its name.
                    self.kv_cache.cache_full_blocks(request, len(token_ids))
            elif request.status is RequestStatus.PREEMPTED:
                request.num_expected_tokens += 1
            else:
                continue  # It ended while the step was in flight.
            token_ids.append(token_id)
            finish_reason: FinishReason | None = None
            if token_id in request.stop_token_ids:
                finish_reason = "stop"
                self._finish(request, RequestStatus.FINISHED_STOPPED)
                any_finished = True
            elif len(token_ids) >= request.max_num_tokens:
                finish_reason = "length"
                self._finish(request, RequestStatus.FINISHED_LENGTH)
                any_finished = True
            request_outputs.append(RequestOutput(request, token_id, finish_reason))
        if any_finished:
            self._drop_finished()
        return request_outputs

    # What can be seen from outside.

    def has_unfinished_requests(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Requests that own blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for admission, preempted ones included."""
        return len(self._waiting)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken; cached blocks that nobody owns are among them."""
        return self.kv_cache.pool.num_free_blocks

    @property
    def running_requests(self) -> Sequence[Request]:
        """In order of admission."""
        return self._running

    @property
    def waiting_requests(self) -> Sequence[Request]:
        """From the next to be admitted to the last."""
        return list(self._waiting)

    def check_integrity(self) -> None:
        """Prove that no request and no block is lost.

        Raises:
            AssertionError: one is; the message says which.
        """
        running, waiting = self._running, list(self._waiting)
        for request in running:
            assert request.status is RequestStatus.RUNNING, f"{request.request_id} runs as {request.status!r}"
            known = len(request.all_token_ids)
            in_flight = request.num_expected_tokens - known
            assert 0 <= in_flight <= len(self._in_flight), f"{request.request_id} expects {in_flight} tokens"
            assert request.num_computed_tokens < request.num_expected_tokens <= request.max_num_tokens, (
                f"{request.request_id} has computed {request.num_computed_tokens} tokens of {known} known"
            )
        for request in waiting:
            assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED), (
                f"{request.request_id} waits as {request.status!r}"
            )
        queued = {request.request_id: request for request in (*running, *waiting)}
        assert len(queued) == len(running) + len(waiting), "a request is queued twice"
        assert queued == self._requests, "the queues and the index of requests disagree"
        assert len(running) <= self.config.max_num_seqs, "more requests run than may"
        self.kv_cache.check_integrity(running, waiting)
