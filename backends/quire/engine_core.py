"""The loop at the heart of the server: schedule, prepare, submit, collect, sample, update.

One call of `EngineCore.step` is one turn of it. Stepped plainly, a turn takes a step through all six.
Overlapped, a turn schedules and prepares the next step while the engine still computes the one before, whose
tokens it returns; with an executor that feeds tokens back it submits it then, too, so that the engine goes
from step to step without waiting for the loop. Which requests run is the scheduler's business, how a step is
run the executor's; who submitted a request and who wants its tokens is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quire.errors import EngineStepError, PeerLostError, QuireError
from quire.execution.executor import Executor, StepHandle
from quire.execution.input_batch import InputBatch, PreparedStep, patch
from quire.execution.sampler import Sampler
from quire.scheduling.request import Request, RequestStatus
from quire.scheduling.scheduler import Scheduler
from quire.scheduling.scheduler_output import RequestOutput, SchedulerOutput

MAX_FAILED_STEPS = 3
"""Failed steps that a request may be part of without gaining a token before it is given up."""
ENGINE_PATIENCE_S = 2.0
"""How long to wait after a failed step for the engine to answer again."""

_NO_TOKENS = np.zeros(0, dtype=np.int32)


@dataclass(slots=True)
class StepResult:
    """What one turn of the loop brought."""

    outputs: list[RequestOutput] = field(default_factory=list)
    failures: list[tuple[str, QuireError]] = field(default_factory=list)
    """Requests that ended with an error, by id."""


@dataclass(slots=True)
class EngineCoreStatistics:
    """Counters since the start."""

    steps: int = 0
    failed_steps: int = 0
    scheduled_tokens: int = 0
    sampled_tokens: int = 0


@dataclass(slots=True)
class _Step:
    """A step on its way through the loop."""

    scheduled: SchedulerOutput
    prepared: PreparedStep
    handle: StepHandle | None = None
    """None until it is submitted."""


class EngineCore:
    """Requests in, tokens out, one step at a time.

    Args:
        scheduler: decides what each step computes; with `async_scheduling` the loop overlaps.
        executor: runs the steps, on an engine whose pool has the scheduler's blocks.
        sampler: chooses the tokens, unless the executor does.
        step_timeout_s: how long a step may take before it counts as failed.
    """

    def __init__(
        self, scheduler: Scheduler, executor: Executor, sampler: Sampler, *, step_timeout_s: float
    ) -> None:
        config = scheduler.config
        self.scheduler = scheduler
        self.statistics = EngineCoreStatistics()
        self._executor = executor
        self._sampler = sampler
        self._batch = InputBatch(
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.max_model_len,
            config.block_size,
            sampled_by_engine=executor.token_feedback,
        )
        if not config.async_scheduling:
            self._turn = self._turn_plain
        elif executor.token_feedback and executor.max_in_flight > 1:
            self._turn = self._turn_ahead
        else:
            self._turn = self._turn_overlapped
        self._step_timeout_s = step_timeout_s
        self._under_way: list[_Step] = []
        self._epoch: int | None = None
        self._failed_steps_of: dict[str, int] = {}

    @property
    def has_work(self) -> bool:
        """Whether another turn would do something."""
        return bool(self._under_way) or self.scheduler.has_unfinished_requests()

    def add_request(self, request: Request) -> None:
        """Take a request; the next turn may schedule it."""
        self.scheduler.add_request(request)

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """End requests without further output; ids that are not known are ignored."""
        request_ids = list(request_ids)
        self.scheduler.abort_requests(request_ids)
        for request_id in request_ids:
            self._failed_steps_of.pop(request_id, None)

    def step(self) -> StepResult:
        """One turn of the loop.

        A step that fails, or that ran on a pool that has lost its contents, costs no request its tokens:
        all running requests are computed anew from what they have. A request that was part of
        `MAX_FAILED_STEPS` such steps without gaining a token is given up.

        Raises:
            PeerLostError: the engine failed and does not answer again, or came back with another pool;
                this core is of no further use.
        """
        try:
            return self._turn()
        except (EngineStepError, PeerLostError) as error:
            return self._recover(error)

    def _turn_plain(self) -> StepResult:
        step = self._schedule_and_prepare()
        if step is None:
            return StepResult()
        self._submit(step)
        token_ids = self._collect_and_sample(step)
        return self._update(step, token_ids)

    def _turn_ahead(self) -> StepResult:
        running = self._under_way[0] if self._under_way else None
        upcoming = self._schedule_and_prepare()
        if upcoming:
            self._submit(upcoming)  # while the engine computes `running`, whose tokens it fills in itself
        return self._update(running, self._collect_and_sample(running)) if running else StepResult()

    def _turn_overlapped(self) -> StepResult:
        running = self._under_way[0] if self._under_way else None
        upcoming = self._schedule_and_prepare()  # while the engine computes `running`
        token_ids = self._collect_and_sample(running) if running else _NO_TOKENS
        if upcoming:
            patch(upcoming.prepared.inputs, token_ids)
            self._submit(upcoming)
        return self._update(running, token_ids) if running else StepResult()

    def _schedule_and_prepare(self) -> _Step | None:
        """The next step, or None if no request can run now."""
        scheduled = self.scheduler.schedule()
        self._batch.update_rows(scheduled)
        if not scheduled.requests:
            return None
        step = _Step(scheduled, self._batch.prepare(scheduled))
        self._under_way.append(step)
        return step

    def _submit(self, step: _Step) -> None:
        step.handle = self._executor.submit(step.prepared.inputs)

    def _collect_and_sample(self, step: _Step) -> NDArray[np.int32]:
        """Wait for a submitted step, and choose its tokens [N] unless the engine has.

        Raises:
            EngineStepError: the step failed, its pool is not the one that earlier steps wrote to, or the best
                logit of a row is not a finite number.
            PeerLostError: the engine is gone.
        """
        assert step.handle is not None
        output = step.handle.result(self._step_timeout_s)
        pool = output.pool_info
        if self._epoch is None:
            self._epoch = pool.epoch
        if pool.epoch != self._epoch or pool.num_blocks != self.scheduler.config.num_blocks:
            raise EngineStepError("the engine was started anew and its KV pool is empty")
        if output.sampled_ids is None:
            assert output.logits is not None, "a step that was not sampled returns its logits"
            token_ids = self._sampler.sample(output.logits, step.prepared.sampling)
        else:
            token_ids = output.sampled_ids
            if token_ids.size and token_ids.min() < 0:
                row = int(np.flatnonzero(token_ids < 0)[0])
                raise EngineStepError(f"the best logit of row {row} is not a finite number")
        self._batch.record(step.prepared, token_ids)
        return token_ids

    def _update(self, step: _Step, token_ids: NDArray[np.int32]) -> StepResult:
        """Tell the scheduler what the oldest step under way brought."""
        del self._under_way[0]
        outputs = self.scheduler.update_from_output(step.scheduled, token_ids.tolist())
        self.statistics.steps += 1
        self.statistics.scheduled_tokens += step.scheduled.total_num_scheduled_tokens
        self.statistics.sampled_tokens += len(outputs)
        if self._failed_steps_of:
            for output in outputs:
                self._failed_steps_of.pop(output.request.request_id, None)
        return StepResult(outputs)

    def _recover(self, error: QuireError) -> StepResult:
        """Start over after a failed step: an empty cache, and every running request waiting to be resumed.

        Of two steps in flight both are lost, whichever of them failed: `pool_info` sees to it that neither is
        under way any more.
        """
        self.statistics.failed_steps += 1
        lost, self._under_way = self._under_way, []
        self.scheduler.reset_after_pool_loss()
        failures = self._give_up_on_requests(error, lost)
        pool = self._executor.pool_info(ENGINE_PATIENCE_S)
        if pool.num_blocks != self.scheduler.config.num_blocks:
            raise PeerLostError("the engine was started anew with a KV pool of another size; try again")
        self._epoch = pool.epoch
        return StepResult(failures=failures)

    def _give_up_on_requests(self, error: QuireError, lost: list[_Step]) -> list[tuple[str, QuireError]]:
        """Count the failure against the requests that took part, and end those that have had their share."""
        part_takers = dict.fromkeys(
            request.request_id
            for step in lost
            for request in step.scheduled.requests
            if request.status < RequestStatus.FINISHED_STOPPED
        )
        given_up = []
        for request_id in part_takers:
            self._failed_steps_of[request_id] = self._failed_steps_of.get(request_id, 0) + 1
            if self._failed_steps_of[request_id] == MAX_FAILED_STEPS:
                del self._failed_steps_of[request_id]
                given_up.append(request_id)
        self.scheduler.fail_requests(given_up)
        return [
            (request_id, EngineStepError(f"the engine failed {MAX_FAILED_STEPS} steps in a row: {error}"))
            for request_id in given_up
        ]
