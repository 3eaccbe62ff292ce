"""The scheduler component: what Triton loads as the model `scheduler`, one instance for all frontends.

Puts together the step loop, the engine core and the channel to the frontends. Triton's own requests to
this model are for control only, and need the access key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from quire.engine_core import EngineCore
from quire.errors import InvalidRequestError, QuireError
from quire.execution.executor import Executor, PoolInfo
from quire.execution.manifest import Manifest, read_manifest
from quire.execution.sampler import Sampler
from quire.interface import EnginePlacement
from quire.scheduling.scheduler import Scheduler, SchedulerConfig
from quire.serving.channel import SchedulerChannel
from quire.serving.component import ComponentArguments, join_server
from quire.serving.engine.loading import load_executor
from quire.serving.rendezvous import Rendezvous
from quire.serving.scheduler.hosted_plan import HostedPlanExecutor
from quire.serving.scheduler.metrics import MetricsReporter
from quire.serving.scheduler.step_loop import StepLoop
from quire.serving.scheduler.triton_executor import TritonExecutor
from quire.serving.server_end import ServerEnd
from quire.serving.tensors import check_access, error_response, input_arrays, response, string_array
from quire.settings import ServingSettings


class SchedulerComponent:
    """The one instance of the model `scheduler`.

    An engine in this process is loaded before Triton calls this model ready. A hosted one may load later and
    cannot be called before; the step loop waits for it.

    Raises:
        StartupError: a setting is malformed or beyond the engine's limits, or engine.json doesn't fit.
    """

    def __init__(self, arguments: ComponentArguments) -> None:
        manifest = read_manifest(arguments.engine_dir)
        settings = arguments.settings().within(manifest.limits)
        self._rendezvous = join_server()
        # A predecessor that died is not missed any more.
        self._rendezvous.withdraw_scheduler()
        executor = _executor(arguments, manifest, settings, self._rendezvous)
        self._channel = SchedulerChannel(self._rendezvous)

        def make_core(pool: PoolInfo) -> EngineCore:
            config = _scheduler_config(manifest, settings, pool, overlap=executor.token_feedback)
            return EngineCore(Scheduler(config), executor, Sampler(), step_timeout_s=settings.step_timeout_s)

        self._server_end = ServerEnd(self._rendezvous)
        self._loop = StepLoop(
            executor,
            make_core,
            self._channel,
            end_server=self._server_end.begin,
            max_queued_requests=settings.max_queued_requests,
        )
        self._metrics = MetricsReporter(self._loop.statistics)
        self._rendezvous.announce_scheduler()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer control requests, one after the other."""
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        """End the loop and the channel; requests that are left end with an error."""
        self._server_end.complete()
        self._rendezvous.withdraw_scheduler()
        self._metrics.close()
        self._loop.stop()
        self._channel.close()
        self._rendezvous.close()

    def _answer(self, request: Any) -> Any:
        try:
            arrays = input_arrays(request)
            check_access(arrays, self._rendezvous.access_key)
            command = arrays["command"][0].decode(errors="replace")
            return response({"answer": string_array(self._obey(command))})
        except QuireError as error:
            return error_response(error)

    def _obey(self, command: str) -> str:
        if command == "statistics":
            return msgspec.json.encode(self._loop.statistics()).decode()
        if command == "drain":
            self._loop.drain()
            return "drained"
        raise InvalidRequestError(f"command is {command!r}; it must be statistics or drain")


def _executor(
    arguments: ComponentArguments, manifest: Manifest, settings: ServingSettings, rendezvous: Rendezvous
) -> Executor:
    """The way to this repository's engine. Only one in this process needs its runtime to be imported."""
    if arguments.engine_placement is EnginePlacement.IN_PROCESS:
        return load_executor(arguments.engine_dir, settings)
    return HostedPlanExecutor(manifest) if manifest.plan else TritonExecutor(rendezvous)


def _scheduler_config(
    manifest: Manifest, settings: ServingSettings, pool: PoolInfo, *, overlap: bool
) -> SchedulerConfig:
    """How this server schedules.

    Overlapping pays only where a step can be submitted before the tokens of the one before are known.
    Otherwise a request that arrives during a step has to wait for the end of the next one, which is decided
    already, and there is little to win: nothing with a hosted engine, 0 to 5% of a turn with one in this
    process at batch 1 to 256. Served to 256 streams that was no more tokens a second, and half as long again
    until the first token (checkpoints/quire-small on 2 cores; engine_placement.py and serving.py in
    tests/benchmarks).
    """
    return SchedulerConfig(
        num_blocks=pool.num_blocks,
        block_size=manifest.block_size,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_num_seqs=settings.max_num_seqs,
        max_model_len=settings.max_model_len,
        async_scheduling=overlap,
    )
