"""The thread that drives the engine core: requests in, one message per frontend and step out.

It sleeps while there is no request. Which request computes what is the scheduler's business, how a step is
run the engine core's; this decides who is let in, remembers which frontend a request belongs to, and sees
to it that every request it took ends in exactly one message to its frontend.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from quire.engine_core import EngineCore
from quire.errors import (
    EngineDeadError,
    EngineStepError,
    OverloadedError,
    PeerLostError,
    QuireError,
    RequestError,
)
from quire.execution.executor import Executor, PoolInfo
from quire.scheduling.request import Request
from quire.scheduling.scheduler_output import RequestOutput
from quire.serving.channel import FrontendLost, SchedulerChannel
from quire.serving.messages import Abort, Finished, Refusal, StepTokens, Submit, ToFrontend

ENGINE_PATIENCE_S = 2.0
"""How long the loop waits for the engine before it tells those who wait, and starts over."""
ENGINE_RETURN_S = 30.0
"""How long an engine that was lost may stay away until it counts as dead."""
STOP_TIMEOUT_S = 2.0
PAUSE_AFTER_FAILURE_S = 0.1
"""So that a mistake that comes back at once does not fill the log."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Route:
    """The way back to whoever submitted a request."""

    frontend: bytes
    """Identity of its connection."""
    request_id: str
    """As the frontend knows it; ids of two frontends may be equal."""


@dataclass(slots=True)
class _Tokens:
    """What a step brought to one frontend, while it is being put together."""

    request_ids: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)


@dataclass(slots=True)
class LoopStatistics:
    """The state of the loop and its counters; all but the first four are 0 until the engine has answered.

    The counters begin anew when the engine was lost.
    """

    frontends: list[str]
    """Connected ones, by name."""
    draining: bool
    malformed_messages: int
    """Messages from frontends that could not be decoded."""
    messages_without_key: int
    """Messages from peers that have not shown the access key."""
    running_requests: int = 0
    waiting_requests: int = 0
    blocks: int = 0
    """Blocks of the KV pool that can hold tokens."""
    free_blocks: int = 0
    """Those of them that no running request owns; cached prefixes are among them."""
    preemptions: int = 0
    looked_up_tokens: int = 0
    """Tokens of admitted requests that were looked up in the prefix cache."""
    cached_tokens: int = 0
    """Those of them that were found there."""
    steps: int = 0
    failed_steps: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0


class StepLoop:
    """Runs until `stop`.

    Args:
        executor: runs the steps; closed by `stop`.
        make_core: makes the engine core for a pool, once the engine has told its size.
        channel: to the frontends.
        end_server: called once, when the engine is dead and every request has been told so.
        max_queued_requests: requests that may wait to be scheduled; more are refused.
    """

    def __init__(
        self,
        executor: Executor,
        make_core: Callable[[PoolInfo], EngineCore],
        channel: SchedulerChannel,
        *,
        end_server: Callable[[EngineDeadError], None],
        max_queued_requests: int,
    ) -> None:
        self.core: EngineCore | None = None
        """None until the engine has answered."""
        self._executor = executor
        self._make_core = make_core
        self._channel = channel
        self._end_server = end_server
        self._max_queued_requests = max_queued_requests
        self._lost_since: float | None = None
        """When the engine stopped answering; None while it answers, and until it has for the first time."""
        self._routes: dict[str, _Route] = {}
        self._num_arrivals = 0
        self._finish_times: deque[float] = deque([time.monotonic()], maxlen=64)
        self._stopping = threading.Event()
        self._draining = False
        self._drained = threading.Event()
        self._thread = threading.Thread(target=self._run, name="quire-step-loop", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Refuse new requests from now on, and return when those taken before have ended."""
        self._draining = True
        self._channel.arrived.set()
        self._drained.wait()

    def stop(self) -> None:
        """End the loop, within `STOP_TIMEOUT_S`, and with it every request that is left."""
        self._stopping.set()
        self._executor.close()
        self._channel.arrived.set()
        self._thread.join(STOP_TIMEOUT_S)
        self._drained.set()

    def statistics(self) -> LoopStatistics:
        """What can be told at this moment; read without stopping the loop."""
        seen = self._channel.statistics
        statistics = LoopStatistics(self._channel.frontends, self._draining, seen.malformed, seen.strangers)
        if core := self.core:
            scheduler = core.scheduler
            statistics.running_requests = scheduler.num_running
            statistics.waiting_requests = scheduler.num_waiting
            statistics.blocks = scheduler.config.num_blocks - 1
            statistics.free_blocks = scheduler.num_free_blocks
            statistics.preemptions = scheduler.statistics.num_preemptions
            statistics.looked_up_tokens = scheduler.statistics.num_looked_up_tokens
            statistics.cached_tokens = scheduler.statistics.num_cached_tokens
            statistics.steps = core.statistics.steps
            statistics.failed_steps = core.statistics.failed_steps
            statistics.computed_tokens = core.statistics.scheduled_tokens
            statistics.generated_tokens = core.statistics.sampled_tokens
        return statistics

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._serve()
            except EngineDeadError as error:
                self._give_up(error)
            except PeerLostError as error:
                if self.core is not None:
                    self._lost_since = time.monotonic()
                self._end_all(error)
            except Exception:
                # The scheduler's state cannot be trusted any more; a new one starts with none.
                _log.exception("the step loop failed; its requests end and it starts over")
                self._end_all(EngineStepError("the scheduler failed; the server's log says why"))
                self._stopping.wait(PAUSE_AFTER_FAILURE_S)
        self._end_all(PeerLostError("the server is stopping; try again later"))

    def _give_up(self, error: EngineDeadError) -> None:
        """End every request, then the server; refuse what comes until it stops this loop."""
        error = EngineDeadError(f"{error}; the server ends, try again later")
        self._end_all(error)
        self._end_server(error)
        while not self._stopping.is_set():
            self._channel.arrived.wait()
            self._end_all(error)

    def _serve(self) -> None:
        self.core = core = self._make_core(self._pool_info())
        while not self._stopping.is_set():
            self._take_arrivals(core)
            if core.has_work:
                self._step(core)
            else:
                if self._draining:
                    self._drained.set()
                self._channel.arrived.wait()

    def _pool_info(self) -> PoolInfo:
        """The engine's pool, once it answers. An engine that never has may still be loading.

        Raises:
            EngineDeadError: the executor says so, or it has been lost for longer than `ENGINE_RETURN_S`.
            PeerLostError: it does not answer.
        """
        try:
            pool = self._executor.pool_info(ENGINE_PATIENCE_S)
        except PeerLostError as error:
            if self._lost_since is None or self._stopping.is_set():
                raise
            lost_s = time.monotonic() - self._lost_since
            if lost_s <= ENGINE_RETURN_S:
                raise
            raise EngineDeadError(f"the engine has been lost for {lost_s:.0f} s: {error}") from None
        self._lost_since = None
        return pool

    def _step(self, core: EngineCore) -> None:
        result = core.step()
        messages = self._tokens(result.outputs)
        for request_id, error in result.failures:
            if route := self._routes.pop(request_id, None):
                messages.append(_refusal(route, error))
        if messages:
            self._channel.send(messages)

    def _tokens(self, outputs: list[RequestOutput]) -> list[tuple[bytes, ToFrontend]]:
        """A step's outputs as one message for each frontend."""
        by_frontend: dict[bytes, _Tokens] = {}
        for output in outputs:
            route = self._routes.get(output.request.request_id)
            if route is None:
                continue
            tokens = by_frontend.get(route.frontend)
            if tokens is None:
                tokens = by_frontend[route.frontend] = _Tokens()
            tokens.request_ids.append(route.request_id)
            tokens.token_ids.append(output.token_id)
            if output.finish_reason is not None:
                tokens.finished.append(Finished(route.request_id, output.finish_reason))
                del self._routes[output.request.request_id]
                self._finish_times.append(time.monotonic())
        return [
            (frontend, StepTokens(tokens.request_ids, tokens.token_ids, tokens.finished))
            for frontend, tokens in by_frontend.items()
        ]

    def _take_arrivals(self, core: EngineCore) -> None:
        for frontend, event in self._channel.receive():
            match event:
                case Submit():
                    self._admit(core, frontend, event)
                case Abort():
                    self._abort(core, [_internal_id(frontend, name) for name in event.request_ids])
                case FrontendLost():
                    routes = self._routes.items()
                    self._abort(core, [own_id for own_id, route in routes if route.frontend == frontend])

    def _admit(self, core: EngineCore, frontend: bytes, submit: Submit) -> None:
        route = _Route(frontend, submit.request_id)
        request = Request(
            _internal_id(frontend, submit.request_id),
            submit.prompt_token_ids,
            submit.sampling_params,
            priority=submit.priority,
            arrival_order=self._num_arrivals,
        )
        try:
            self._check_room(core)
            core.scheduler.check_request(request)
        except RequestError as error:
            self._channel.send([_refusal(route, error)])
            return
        self._num_arrivals += 1
        self._routes[request.request_id] = route
        core.add_request(request)

    def _check_room(self, core: EngineCore) -> None:
        """Refuse to queue one more request while the server stops or too many wait.

        Raises:
            OverloadedError: with what the client can do.
        """
        if self._draining:
            raise OverloadedError("the server is stopping and takes no new requests; try another one")
        waiting = core.scheduler.num_waiting
        if waiting >= self._max_queued_requests:
            retry_s = self._seconds_to_finish(waiting - self._max_queued_requests + 1)
            raise OverloadedError(
                f"{waiting} requests are waiting, the limit is {self._max_queued_requests}; "
                f"try again in {retry_s} seconds"
            )

    def _seconds_to_finish(self, num_requests: int) -> int:
        """How long `num_requests` will take at the rate at which requests finished lately, 1 to 60."""
        elapsed_s = time.monotonic() - self._finish_times[0]
        return min(60, math.ceil(num_requests * elapsed_s / len(self._finish_times)) or 1)

    def _abort(self, core: EngineCore, request_ids: list[str]) -> None:
        known = [request_id for request_id in request_ids if self._routes.pop(request_id, None)]
        if known:
            core.abort_requests(known)

    def _end_all(self, error: QuireError) -> None:
        """End every request there is with `error`, those included that have only just arrived."""
        self.core = None
        routes = list(self._routes.values())
        self._routes.clear()
        for frontend, event in self._channel.receive():
            if isinstance(event, Submit):
                routes.append(_Route(frontend, event.request_id))
        if routes:
            self._channel.send([_refusal(route, error) for route in routes])
        if self._draining:
            self._drained.set()


def _internal_id(frontend: bytes, request_id: str) -> str:
    return f"{frontend.hex()}/{request_id}"


def _refusal(route: _Route, error: QuireError) -> tuple[bytes, ToFrontend]:
    return route.frontend, Refusal(route.request_id, type(error).__name__, str(error))
