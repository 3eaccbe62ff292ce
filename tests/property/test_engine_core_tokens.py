from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tests.property.hashing_engine import (
    VOCAB_SIZE,
    Failures,
    HashingExecutor,
    context_logits,
    entries_of,
)
from tests.unit.strict_executor import AHEAD, MODES, OVERLAPPED, PLAIN, Mode

from quire.engine_core import MAX_FAILED_STEPS, EngineCore
from quire.errors import EngineStepError, PeerLostError, QuireError
from quire.execution.sampler import Sampler, SamplingBatch
from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig

NUM_WORKLOADS = 1000
OTHER_MODES = MODES[3:]


@dataclass
class Arrival:
    """A request of a workload: when it comes and, unless None, when it is aborted."""

    step: int
    abort_step: int | None
    prompt: list[int]
    parameters: SamplingParams
    priority: int


@dataclass
class Workload:
    config: dict[str, Any]
    arrivals: list[Arrival]


def random_workload(seed: int) -> Workload:
    """A few requests, sharing prefixes, on a pool that often is too small for all of them."""
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 3, 4, 8, 16, 32])
    longest = rng.randint(8, 2 * block_size + 16)
    blocks_of_longest = -(-longest // block_size)
    num_requests = rng.randint(2, 6)
    config = {
        "num_blocks": 1 + blocks_of_longest + rng.randint(0, blocks_of_longest),
        "block_size": block_size,
        "max_num_batched_tokens": rng.choice([4, 7, 16, 64]),
        "max_num_seqs": rng.randint(2, 4),
        "max_model_len": longest,
        "policy": rng.choice(["fcfs", "priority"]),
        "enable_prefix_caching": rng.random() < 0.8,
        "long_prefill_token_threshold": rng.choice([0, 0, 3]),
    }
    stems = [[rng.randrange(VOCAB_SIZE) for _ in range(longest)] for _ in range(2)]
    arrivals = []
    for _ in range(num_requests):
        shared = rng.randrange(longest)
        length = max(1, rng.randint(1, longest - 1))
        prompt = rng.choice(stems)[:shared] + [rng.randrange(VOCAB_SIZE) for _ in range(longest)]
        greedy = rng.random() < 0.5
        arrive = rng.randint(0, 5)
        arrivals.append(
            Arrival(
                step=arrive,
                abort_step=arrive + rng.randint(0, 8) if rng.random() < 0.2 else None,
                prompt=prompt[:length],
                parameters=SamplingParams(
                    max_tokens=rng.randint(1, 14),
                    temperature=0.0 if greedy else 1.3,
                    seed=rng.getrandbits(64),
                    stop_token_ids=(rng.randrange(VOCAB_SIZE),) if rng.random() < 0.5 else (),
                ),
                priority=rng.randrange(3),
            )
        )
    return Workload(config, arrivals)


def tokens_alone(workload: Workload) -> list[list[int]]:
    """What each request generates alone, straight from the definition of the fake engine."""
    return [_tokens_alone(arrival, int(workload.config["max_model_len"])) for arrival in workload.arrivals]


def _tokens_alone(arrival: Arrival, max_model_len: int) -> list[int]:
    parameters, tokens = arrival.parameters, list(arrival.prompt)
    end = min(len(tokens) + parameters.max_tokens, max_model_len)
    while len(tokens) < end:
        sampling = SamplingBatch(
            np.array([1 / parameters.temperature if parameters.temperature else 0], np.float32),
            np.array([parameters.top_k]),
            np.array([parameters.top_p], np.float32),
            np.array([parameters.min_p], np.float32),
            np.array([parameters.seed], np.uint64),
            np.array([len(tokens) - len(arrival.prompt)]),
        )
        logits = context_logits(entries_of(tokens))[None]
        tokens.append(int(Sampler().sample(logits, sampling)[0]))
        if tokens[-1] in parameters.stop_token_ids:
            break
    return tokens[len(arrival.prompt) :]


@dataclass
class Outcome:
    """What came of a workload's requests, by their index."""

    tokens: dict[int, list[int]]
    finished: dict[int, str]
    failed: dict[int, QuireError]
    num_preemptions: int
    num_cached_tokens: int


def run_workload(workload: Workload, mode: Mode, failures: Failures | None = None) -> Outcome:
    """Drive an engine core through it, and check that blocks balance after every turn."""
    config = SchedulerConfig(**workload.config, async_scheduling=mode.overlap)
    executor = HashingExecutor(config, mode, failures) if failures else HashingExecutor(config, mode)
    scheduler = Scheduler(config)
    core = EngineCore(scheduler, executor, Sampler(), step_timeout_s=60)
    outcome = Outcome({}, {}, {}, 0, 0)
    turn = 0
    while core.has_work or turn <= max(arrival.step for arrival in workload.arrivals):
        for index, arrival in enumerate(workload.arrivals):
            if arrival.step == turn:
                core.add_request(
                    Request(str(index), arrival.prompt, arrival.parameters, arrival.priority, index)
                )
                outcome.tokens[index] = []
            if arrival.abort_step == turn and index not in outcome.finished and index not in outcome.failed:
                core.abort_requests([str(index)])
                outcome.finished[index] = "abort"
        result = core.step()
        for output in result.outputs:
            index = int(output.request.request_id)
            assert index not in outcome.finished, "a token after the end"
            assert index not in outcome.failed, "a token after the end"
            outcome.tokens[index].append(output.token_id)
            if output.finish_reason:
                outcome.finished[index] = output.finish_reason
        for request_id, error in result.failures:
            assert int(request_id) not in outcome.finished | outcome.failed, "a second end"
            outcome.failed[int(request_id)] = error
        scheduler.check_integrity()
        turn += 1
        assert turn < 5000, "the workload does not end"
    assert set(outcome.finished) | set(outcome.failed) == set(range(len(workload.arrivals)))
    assert scheduler.num_free_blocks == config.num_blocks - 1
    outcome.num_preemptions = scheduler.statistics.num_preemptions
    outcome.num_cached_tokens = scheduler.statistics.num_cached_tokens
    return outcome


def assert_tokens(outcome: Outcome, expected_of_all: list[list[int]]) -> None:
    """Finished requests have all of their tokens, others those up to where they were ended."""
    for index, expected in enumerate(expected_of_all):
        if outcome.finished.get(index) in ("stop", "length"):
            assert outcome.tokens[index] == expected
        else:
            assert outcome.tokens[index] == expected[: len(outcome.tokens[index])]


@pytest.mark.parametrize("part", range(10))
def test_every_position_is_written_where_it_is_read(part: int) -> None:
    """Any batch gives each request the tokens that it gets alone, in every way of running the loop."""
    size = NUM_WORKLOADS // 10
    preemptions = cached = aborted = 0
    for seed in range(part * size, (part + 1) * size):
        workload = random_workload(seed)
        expected = tokens_alone(workload)
        for mode in (PLAIN, OVERLAPPED, AHEAD, OTHER_MODES[seed % len(OTHER_MODES)]):
            outcome = run_workload(workload, mode)
            assert not outcome.failed
            assert_tokens(outcome, expected)
            preemptions += outcome.num_preemptions
            cached += outcome.num_cached_tokens
            aborted += list(outcome.finished.values()).count("abort")
    assert preemptions > size // 4
    assert cached > size
    assert aborted > size // 10


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_failed_step_or_a_lost_pool_costs_no_token(mode: Mode) -> None:
    kinds = [EngineStepError("the step failed"), PeerLostError("the engine is gone"), None]
    num_failures = 0
    for seed in range(100):
        rng = random.Random(seed)
        failures = Failures({rng.randrange(12): rng.choice(kinds) for _ in range(MAX_FAILED_STEPS - 1)})
        workload = random_workload(seed)
        outcome = run_workload(workload, mode, failures)
        assert not outcome.failed
        assert_tokens(outcome, tokens_alone(workload))
        num_failures += failures.num_failures
    assert num_failures > 100


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_requests_on_an_engine_that_always_fails_end_with_its_error_once(mode: Mode) -> None:
    failures = Failures(dict.fromkeys(range(5000), EngineStepError("out of order")))
    for seed in range(30):
        outcome = run_workload(random_workload(seed), mode, failures)
        assert outcome.failed
        assert all(isinstance(error, EngineStepError) for error in outcome.failed.values())
        assert all("out of order" in str(error) for error in outcome.failed.values())
        assert set(outcome.finished.values()) <= {"abort"}
