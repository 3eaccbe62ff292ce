"""Steps on a TensorRT plan in process, with the GPU and the plan of fake_gpu.py."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.unit.fake_gpu import (
    BLOCK_SIZE,
    DETAILS,
    GREEDY,
    KV_BYTES_PER_BLOCK,
    LIMITS,
    VOCAB_SIZE,
    FakeDevice,
    FakePlan,
    Run,
    next_token,
)

from quire.engine_core import EngineCore
from quire.errors import EngineDeadError, EngineStepError, PeerLostError, SettingsError, StartupError
from quire.execution.manifest import EngineLimits
from quire.execution.model_inputs import ModelInputs
from quire.execution.sampler import Sampler
from quire.execution.tensorrt.engine import GRAPH_MARGIN_BYTES, TensorRTEngine
from quire.execution.tensorrt.executor import TensorRTExecutor
from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES
from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig

NUM_BLOCKS = 200
TABLE_WIDTH = LIMITS.max_model_len // BLOCK_SIZE
TIMEOUT_S = 5.0


@dataclass
class Server:
    device: FakeDevice
    plan: FakePlan
    executor: TensorRTExecutor

    def run(self, inputs: ModelInputs) -> list[int]:
        """The tokens of one step."""
        ids = self.executor.submit(inputs).result(TIMEOUT_S).sampled_ids
        assert ids is not None
        return ids.tolist()  # type: ignore[no-any-return]


def serve(
    *,
    limits: EngineLimits = LIMITS,
    kv_cache_bytes: int = NUM_BLOCKS * KV_BYTES_PER_BLOCK,
    return_logits: bool = False,
    **details: Any,
) -> Server:
    device = FakeDevice()
    plan = FakePlan(device, **details)
    engine = TensorRTEngine(plan, device, limits, kv_cache_bytes=kv_cache_bytes)
    plan.runs.clear()
    device.copied_out.clear()
    return Server(device, plan, TensorRTExecutor(engine, return_logits=return_logits))


@pytest.fixture
def server() -> Server:
    return serve()


@dataclass
class Sequences:
    """Running sequences and their blocks; each owns the blocks that one of full length needs."""

    tokens: list[list[int]]
    computed: list[int]
    step_number: int = 0
    first_block: int = 1

    def step(
        self,
        members: Sequence[int],
        *,
        counts: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
        marks: Sequence[int] = (),
        sampling: tuple[float, ...] | None = GREEDY,
    ) -> ModelInputs:
        """A step of all tokens not computed yet, or `counts` of them.

        Each member in `rows`, or all, wants logits; those in `marks` end with a mark, of row 0, 1, ….
        """
        self.step_number += 1
        blocks = -(-LIMITS.max_model_len // BLOCK_SIZE)
        given = [self.tokens[m][self.computed[m] :] for m in members]
        if counts is not None:
            given = [tokens[:count] for tokens, count in zip(given, counts, strict=True)]
        for row, member in enumerate(marks):
            given[members.index(member)][-1] = -1 - row
        lengths = [self.computed[m] + len(tokens) for m, tokens in zip(members, given, strict=True)]
        width = -(-max(lengths) // BLOCK_SIZE)
        tables = np.array(
            [[self.first_block + m * blocks + b for b in range(width)] for m in members], np.int32
        )
        starts = np.cumsum([0, *map(len, given)]).astype(np.int32)
        positions = np.concatenate(
            [np.arange(self.computed[m], length) for m, length in zip(members, lengths, strict=True)]
        )
        sequence = np.repeat(np.arange(len(members)), np.diff(starts))
        wanted = [members.index(member) for member in (members if rows is None else rows)]
        for member, length in zip(members, lengths, strict=True):
            self.computed[member] = length
        return ModelInputs(
            step=self.step_number,
            input_ids=np.concatenate(given).astype(np.int32),
            positions=positions.astype(np.int32),
            slot_mapping=(
                tables[sequence, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            ).astype(np.int32),
            block_tables=tables,
            query_start_loc=starts,
            seq_lens=np.array(lengths, np.int32),
            logits_indices=starts[1:][wanted] - 1,
            sampling=None
            if sampling is None
            else np.array([sampling] * len(wanted), np.float32).reshape(-1, 5),
        )

    def expected(self, members: Sequence[int]) -> list[int]:
        return [next_token(self.tokens[member]) for member in members]

    def append(self, members: Sequence[int]) -> None:
        """Give each member the token that the plan has sampled, or will."""
        for member, token in zip(members, self.expected(members), strict=True):
            self.tokens[member].append(token)


def prompts(*lengths: int) -> Sequences:
    rng = np.random.default_rng(3)
    return Sequences([rng.integers(0, VOCAB_SIZE, n).tolist() for n in lengths], [0] * len(lengths))


# Sizes


def run_of(profile: int, size: int, *, tokens: int, rows: int) -> Run:
    """A step of one of the plan's sizes, with as many sequences and rows as that can have."""
    seqs = min(size, LIMITS.max_num_seqs)
    return Run(profile, size, seqs, seqs, TABLE_WIDTH, tokens, rows)


@pytest.mark.parametrize(
    ("num_seqs", "profile", "size"),
    [(1, 0, 1), (2, 0, 2), (3, 0, 4), (5, 1, 8), (8, 1, 8), (9, 1, 12), (12, 1, 12)],
)
def test_a_decode_step_takes_the_next_size_and_padding_changes_no_token(
    server: Server, num_seqs: int, profile: int, size: int
) -> None:
    sequences = prompts(*range(1, num_seqs + 1))
    members = list(range(num_seqs))
    for member in members:
        assert server.run(sequences.step([member])) == sequences.expected([member])
    server.plan.runs.clear()
    for _ in range(6):
        sequences.append(members)
        assert server.run(sequences.step(members)) == sequences.expected(members)
    assert server.plan.runs == [run_of(profile, size, tokens=num_seqs, rows=num_seqs)] * 6


@pytest.mark.parametrize(
    ("length", "profile", "size"),
    [(2, 0, 2), (3, 0, 4), (4, 0, 4), (5, 1, 8), (13, 1, 16), (16, 1, 16), (17, 2, 32), (40, 2, 64)],
)
def test_a_prompt_takes_the_next_size_in_the_profile_that_holds_it(
    server: Server, length: int, profile: int, size: int
) -> None:
    sequences = prompts(length)
    assert server.run(sequences.step([0])) == sequences.expected([0])
    assert server.plan.runs == [run_of(profile, size, tokens=length, rows=1)]


def test_a_step_of_many_tokens_keeps_its_tensors_apart(server: Server) -> None:
    sequences = prompts(40, 39, 38, 37)
    assert server.run(sequences.step([0, 1, 2, 3])) == sequences.expected([0, 1, 2, 3])
    assert server.plan.runs == [run_of(2, 200, tokens=154, rows=4)]


def test_the_largest_step_that_the_limits_allow_needs_no_padding(server: Server) -> None:
    sequences = prompts(*[17] * 8, *[16] * 4)
    members = list(range(12))
    assert server.run(sequences.step(members)) == sequences.expected(members)
    assert server.plan.runs == [run_of(2, 200, tokens=200, rows=12)]


def test_prompts_in_chunks_run_beside_decoding_sequences(server: Server) -> None:
    sequences = prompts(6, 20, 3)
    assert server.run(sequences.step([0])) == sequences.expected([0])
    sequences.append([0])
    assert server.run(sequences.step([1, 0], counts=[7, 1], rows=[0])) == sequences.expected([0])
    sequences.append([0])
    assert server.run(sequences.step([0, 1, 2], counts=[1, 13, 3])) == sequences.expected([0, 1, 2])
    assert server.plan.runs == [
        run_of(1, 8, tokens=6, rows=1),
        run_of(1, 8, tokens=8, rows=1),
        run_of(2, 32, tokens=17, rows=3),
    ]


@pytest.mark.parametrize("count", [1, 6])
def test_a_step_without_rows_of_logits_gives_none_and_fills_the_cache(server: Server, count: int) -> None:
    sequences = prompts(10)
    assert server.run(sequences.step([0], counts=[count], rows=[])) == []
    assert server.plan.runs[-1].rows == 0
    assert server.run(sequences.step([0])) == sequences.expected([0])


def test_nothing_of_a_larger_step_is_left_in_the_padding_of_the_next(server: Server) -> None:
    """Of the same size, and of a smaller one whose tensors lie elsewhere in the same memory."""
    sequences = prompts(*[1] * 12, 9, 3)
    sampled = (1.0, 5.0, 0.5, 0.1, 0.0)
    for members in ([*range(12)], [12], [*range(12)], [13, 0], [*range(12)], [1, 5]):
        step = sequences.step(members, sampling=sampled)
        assert server.run(step) == sequences.expected(members)
        sequences.append(members)


def test_each_size_is_one_graph_and_no_step_adds_any(server: Server) -> None:
    graphs, contexts = list(server.device.graphs), len(server.plan.contexts)
    assert len(graphs) == len(DETAILS.step_sizes)
    for tokens in (1, 2, 3, 6, 11, 15, 20, 39):
        sequences = prompts(tokens)
        for members in ([0], [0]):
            assert server.run(sequences.step(members)) == sequences.expected(members)
            sequences.append(members)
    assert server.device.graphs == graphs
    assert len(server.plan.contexts) == contexts
    assert {graphs.index(graph) for graph in server.device.launched} == {0, 1, 2, 3, 4, 5, 6, 7}


def test_only_some_of_the_decoding_sequences_may_want_tokens(server: Server) -> None:
    sequences = prompts(1, 1, 1)
    assert server.run(sequences.step([0, 1, 2], rows=[2, 0])) == sequences.expected([2, 0])


def test_sampling_parameters_arrive_by_row(server: Server) -> None:
    sequences = prompts(1, 2, 3)
    step = sequences.step([0, 1, 2])
    assert step.sampling is not None
    step.sampling[:, 0], step.sampling[:, 4] = (1.0, 0.0, 0.5), (0.25, 0.5, 0.75)
    uniforms = (0.25, 0.0, 0.75)
    expected = [next_token(tokens, u) for tokens, u in zip(sequences.tokens, uniforms, strict=True)]
    assert server.run(step) == expected


def test_a_step_without_sampling_returns_logits_and_no_tokens(server: Server) -> None:
    sequences = prompts(5, 1)
    for members in ([0, 1], [0, 1]):
        output = server.executor.submit(sequences.step(members, sampling=None)).result(TIMEOUT_S)
        assert output.sampled_ids is None
        assert output.logits is not None
        assert output.logits.shape == (2, VOCAB_SIZE)
        assert output.logits.argmax(axis=1).tolist() == sequences.expected(members)
        sequences.append(members)


def test_logits_leave_the_gpu_only_when_they_are_asked_for() -> None:
    quiet, telling = serve(), serve(return_logits=True)
    for server in (quiet, telling):
        sequences = prompts(3)
        output = server.executor.submit(sequences.step([0])).result(TIMEOUT_S)
        assert output.sampled_ids is not None
        assert output.sampled_ids.tolist() == sequences.expected([0])
        copied = 4 * VOCAB_SIZE in server.device.copied_out
        assert copied == (output.logits is not None) == (server is telling)


def test_more_rows_of_logits_than_the_plan_has_are_refused(server: Server) -> None:
    step = prompts(20).step([0])
    step.logits_indices = np.arange(13, dtype=np.int32)
    step.sampling = None
    with pytest.raises(EngineStepError, match="logits_indices has 13 rows; it must have at most 12"):
        server.executor.submit(step)


# Two steps under way


def test_two_steps_are_under_way_and_the_second_takes_the_firsts_tokens_on_the_gpu(server: Server) -> None:
    sequences = prompts(4, 7, 2)
    members = [0, 1, 2]
    server.device.held = True
    handle = server.executor.submit(sequences.step(members))
    for _ in range(5):
        expected = sequences.expected(members)
        sequences.append(members)
        upcoming = sequences.step(members, marks=members)
        assert upcoming.input_ids.tolist() == [-1, -2, -3]
        following = server.executor.submit(upcoming)
        server.device.run()
        ids = handle.result(TIMEOUT_S).sampled_ids
        assert ids is not None
        assert ids.tolist() == expected
        handle = following


def test_a_mark_follows_a_sequence_to_another_place_in_the_next_step(server: Server) -> None:
    sequences = prompts(4, 7, 2)
    server.device.held = True
    first = server.executor.submit(sequences.step([0, 1, 2]))
    sequences.append([0, 1, 2])
    step = sequences.step([2, 0])
    step.input_ids[:] = -3, -1
    second = server.executor.submit(step)
    server.device.run()
    first.result(TIMEOUT_S)
    ids = second.result(TIMEOUT_S).sampled_ids
    assert ids is not None
    assert ids.tolist() == sequences.expected([2, 0])


def test_the_inputs_arrays_may_change_once_the_step_is_submitted(server: Server) -> None:
    sequences = prompts(9)
    server.device.held = True
    step = sequences.step([0])
    handle = server.executor.submit(step)
    step.input_ids[:] = 0
    step.block_tables[:] = 0
    server.device.run()
    ids = handle.result(TIMEOUT_S).sampled_ids
    assert ids is not None
    assert ids.tolist() == sequences.expected([0])


def test_sampled_tokens_outlive_the_executor(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing frees the memory that they come from, which is somebody else's then."""
    free = server.device.free_pinned

    def free_and_overwrite(memory: NDArray[np.uint8]) -> None:
        free(memory)
        memory[:] = 0xEE

    monkeypatch.setattr(server.device, "free_pinned", free_and_overwrite)
    sequences = prompts(5)
    ids = server.executor.submit(sequences.step([0])).result(TIMEOUT_S).sampled_ids
    server.executor.close()
    assert ids is not None
    assert ids.tolist() == sequences.expected([0])


def test_a_step_that_ended_as_the_executor_was_closed_reads_nothing_of_it(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = server.executor._wait

    def wait_and_close(*arguments: Any) -> bool:
        done = wait(*arguments)
        server.executor.close()
        return done

    monkeypatch.setattr(server.executor, "_wait", wait_and_close)
    handle = server.executor.submit(prompts(5).step([0]))
    with pytest.raises(PeerLostError, match="stopping"):
        handle.result(TIMEOUT_S)


def test_a_third_step_is_refused_until_one_is_collected(server: Server) -> None:
    sequences = prompts(1, 1, 1)
    server.device.held = True
    first = server.executor.submit(sequences.step([0]))
    server.executor.submit(sequences.step([1]))
    third = sequences.step([2])
    with pytest.raises(EngineStepError, match="2 steps are under way"):
        server.executor.submit(third)
    server.device.held = False
    first.result(TIMEOUT_S)
    ids = server.executor.submit(third).result(TIMEOUT_S).sampled_ids
    assert ids is not None
    assert ids.tolist() == sequences.expected([2])


@pytest.mark.parametrize("before", ["nothing", "logits", "no rows", "fewer rows", "pool_info"])
def test_marks_of_rows_that_the_step_before_did_not_sample_are_refused(server: Server, before: str) -> None:
    sequences = prompts(3, 3)
    if before != "nothing":
        sampling = None if before == "logits" else GREEDY
        rows = {"no rows": [], "fewer rows": [1]}.get(before)
        server.executor.submit(sequences.step([0, 1], rows=rows, sampling=sampling)).result(TIMEOUT_S)
    if before == "pool_info":
        server.executor.pool_info(TIMEOUT_S)
    sequences.append([0, 1])
    with pytest.raises(EngineStepError, match="input_ids contains -2"):
        server.executor.submit(sequences.step([0, 1], marks=[0, 1]))


# Failures


def test_a_step_that_takes_too_long_fails_and_the_engine_goes_on_once_it_has_ended(server: Server) -> None:
    sequences = prompts(5, 6, 7)
    server.device.held = True
    first, second = (server.executor.submit(sequences.step([m])) for m in (0, 1))
    with pytest.raises(EngineStepError, match="step 1 took longer than 0 s"):
        first.result(0)
    with pytest.raises(PeerLostError):
        server.executor.submit(prompts(1).step([0]))
    with pytest.raises(PeerLostError, match="still computes a step"):
        server.executor.pool_info(0)
    server.device.held = False
    assert server.executor.pool_info(TIMEOUT_S).num_blocks == NUM_BLOCKS
    for handle in (first, second):
        with pytest.raises(EngineStepError, match="was given up"):
            handle.result(TIMEOUT_S)
    for member in (2, 2):
        assert server.run(sequences.step([member])) == sequences.expected([member])
        sequences.append([member])


def test_waiting_for_a_step_ends_when_it_is_done(server: Server) -> None:
    sequences = prompts(5)
    server.device.held = True
    handle = server.executor.submit(sequences.step([0]))
    threading.Timer(0.02, server.device.run).start()
    ids = handle.result(TIMEOUT_S).sampled_ids
    assert ids is not None
    assert ids.tolist() == sequences.expected([0])


def test_after_a_cuda_error_that_stays_the_engine_is_dead(server: Server) -> None:
    sequences = prompts(5, 5)
    handle = server.executor.submit(sequences.step([0]))
    server.device.error = "cudaEventQuery failed with cudaErrorIllegalAddress"
    with pytest.raises(EngineStepError, match=r"step 1 failed: .*cudaErrorIllegalAddress"):
        handle.result(TIMEOUT_S)
    with pytest.raises(PeerLostError):
        server.executor.submit(sequences.step([1]))
    for _ in range(2):
        with pytest.raises(EngineDeadError, match=r"the GPU is lost: .*cudaErrorIllegalAddress"):
            server.executor.pool_info(0)
    server.executor.close()


def test_a_cuda_error_that_does_not_stay_costs_one_step(server: Server) -> None:
    sequences = prompts(5, 6)
    server.device.error = "cudaMemcpyAsync failed with cudaErrorInvalidValue"
    with pytest.raises(EngineStepError, match=r"step 1 cannot be run: .*cudaErrorInvalidValue"):
        server.executor.submit(sequences.step([0]))
    server.device.error = ""
    server.executor.pool_info(TIMEOUT_S)
    assert server.run(sequences.step([1])) == sequences.expected([1])


def test_a_step_whose_graph_cannot_be_launched_fails_alone(server: Server) -> None:
    sequences = prompts(5, 6)
    server.device.launch_error = "cudaGraphLaunch failed with cudaErrorInvalidValue"
    with pytest.raises(EngineStepError, match=r"step 1 cannot be run: cudaGraphLaunch failed"):
        server.executor.submit(sequences.step([0]))
    server.device.launch_error = ""
    with pytest.raises(PeerLostError):
        server.executor.submit(prompts(1).step([0]))
    server.executor.pool_info(TIMEOUT_S)
    assert server.run(sequences.step([1])) == sequences.expected([1])


def test_a_step_that_breaks_the_contract_is_refused_and_the_engine_goes_on(server: Server) -> None:
    sequences = prompts(5)
    broken = prompts(5).step([0])
    broken.block_tables[0, 0] = NUM_BLOCKS
    with pytest.raises(EngineStepError, match=f"block_tables contains {NUM_BLOCKS}"):
        server.executor.submit(broken)
    assert server.run(sequences.step([0])) == sequences.expected([0])


def test_the_outputs_of_another_step_are_not_taken_for_this_one(server: Server) -> None:
    server.plan.step_added = 1
    handle = server.executor.submit(prompts(5).step([0]))
    with pytest.raises(EngineStepError, match="answered step 2 in place of step 1"):
        handle.result(TIMEOUT_S)


def test_the_epoch_stays_as_long_as_the_engine_and_is_new_with_each() -> None:
    first, second = serve(), serve()
    epochs = {first.executor.pool_info(TIMEOUT_S).epoch for _ in range(2)}
    output = first.executor.submit(prompts(5).step([0])).result(TIMEOUT_S)
    assert epochs == {output.pool_info.epoch}
    assert second.executor.pool_info(TIMEOUT_S).epoch not in epochs


def test_a_pool_with_another_epoch_than_the_engines_is_noticed(server: Server) -> None:
    server.executor.pool_info(TIMEOUT_S).epoch += 1
    handle = server.executor.submit(prompts(5).step([0]))
    with pytest.raises(EngineStepError, match="answered with blocks and epoch"):
        handle.result(TIMEOUT_S)


# The end


def test_closing_gives_everything_back_and_may_be_repeated(server: Server) -> None:
    handle = server.executor.submit(prompts(5).step([0], sampling=None))
    server.executor.close()
    server.executor.close()
    assert not server.device.allocations
    assert not server.device.pinned_memory
    assert not server.device.graphs
    assert server.plan.closed
    assert server.device.closed
    with pytest.raises(PeerLostError, match="the server is stopping"):
        handle.result(TIMEOUT_S)
    with pytest.raises(PeerLostError, match="the server is stopping"):
        server.executor.submit(prompts(5).step([0]))
    with pytest.raises(PeerLostError, match="the server is stopping"):
        server.executor.pool_info(TIMEOUT_S)


def test_closing_takes_no_memory_from_under_a_step_that_does_not_end(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.execution.tensorrt.executor.CLOSE_TIMEOUT_S", 0.01)
    server.device.held = True
    server.executor.submit(prompts(5).step([0]))
    server.executor.close()
    assert server.device.allocations
    assert server.device.pinned_memory


def test_closing_ends_the_wait_of_another_thread(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.execution.tensorrt.executor.CLOSE_TIMEOUT_S", 0.01)
    server.device.held = True
    handle = server.executor.submit(prompts(5).step([0]))
    threading.Timer(0.02, server.executor.close).start()
    with pytest.raises(PeerLostError, match="the server is stopping"):
        handle.result(60)


# Start: limits, memory, pool


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(3, (1, 2, 4)), (4, (1, 2, 4)), (16, (1, 2, 4, 8, 12, 16)), (17, (1, 2, 4, 8, 12, 16, 32))],
)
def test_lower_limits_capture_fewer_sizes_with_fewer_rows_and_narrower_tables(
    most: int, sizes: tuple[int, ...]
) -> None:
    """The last size may be above the limit: its padding is not more than another's."""
    server = serve(limits=EngineLimits(max_num_seqs=3, max_num_batched_tokens=most, max_model_len=17))
    assert len(server.device.graphs) == len(sizes)
    sequences = prompts(1, 1, 1, most)
    assert server.run(sequences.step([0, 1, 2])) == sequences.expected([0, 1, 2])
    assert server.run(sequences.step([3])) == sequences.expected([3])
    first, second = server.plan.runs
    assert first == Run(0, 4, 3, 3, 5, tokens=3, rows=3)
    assert (second.size, second.num_rows, second.tokens) == (sizes[-1], 3, most)


def test_more_tokens_than_all_sequences_can_have_are_captured_all_the_same() -> None:
    limits = EngineLimits(max_num_seqs=2, max_num_batched_tokens=100, max_model_len=9)
    server = serve(limits=limits)
    assert len(server.device.graphs) == len(DETAILS.step_sizes)
    sequences = prompts(9, 9)
    assert server.run(sequences.step([0, 1])) == sequences.expected([0, 1])


@pytest.mark.parametrize("shared_bytes", [DEFAULT_SHARED_BYTES, 227 * 1024])
def test_the_plans_kernels_get_their_shared_memory_while_it_is_made_ready_and_only_then(
    shared_bytes: int,
) -> None:
    """The fake plan refuses to run without."""
    server = serve(kernel_shared_bytes=shared_bytes)
    assert server.device.allowed == [shared_bytes]
    assert server.device.shared_bytes == DEFAULT_SHARED_BYTES
    sequences = prompts(5)
    assert server.run(sequences.step([0])) == sequences.expected([0])
    assert server.device.allowed == [shared_bytes]


def test_shared_memory_that_cannot_be_had_is_refused_at_start_and_nothing_stays_allocated() -> None:
    device = FakeDevice()
    plan = FakePlan(device)
    device.allowing_error = "this engine needs CUPTI of CUDA 13"
    with pytest.raises(StartupError, match="needs CUPTI of CUDA 13"):
        TensorRTEngine(plan, device, LIMITS)
    assert not device.allocations
    assert plan.closed


@pytest.mark.parametrize("num_seqs", [1, 5])
def test_a_pool_cut_into_several_tensors_serves_every_block(num_seqs: int) -> None:
    server = serve(num_pools=3, blocks_per_pool=80, max_blocks=220)
    assert server.executor.pool_info(TIMEOUT_S).num_blocks == NUM_BLOCKS
    for first_block in (76, 150):
        sequences = prompts(*[20] * num_seqs)
        sequences.first_block = first_block
        members = list(range(num_seqs))
        for member in members:
            server.run(sequences.step([member]))
        sequences.append(members)
        assert server.run(sequences.step(members)) == sequences.expected(members)


def test_the_pool_takes_what_the_utilization_leaves_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = FakeDevice(graph_bytes=1 << 20)
    plan = FakePlan(device)
    with caplog.at_level(logging.INFO):
        engine = TensorRTEngine(plan, device, LIMITS, gpu_memory_utilization=40)
    allowed = device.total_bytes * 40 // 100
    used = device.total_bytes - device.memory().free
    assert allowed - GRAPH_MARGIN_BYTES - KV_BYTES_PER_BLOCK < used <= allowed - GRAPH_MARGIN_BYTES
    usable = engine.pool_info.num_blocks - 1
    assert f"KV cache: {usable:,} blocks of 4 tokens, {4 * usable:,} tokens" in caplog.text


def test_the_pool_is_no_larger_than_the_plan_can_address() -> None:
    server = serve(kv_cache_bytes=0, max_blocks=77, blocks_per_pool=77)
    assert server.executor.pool_info(TIMEOUT_S).num_blocks == 77


def test_a_pool_that_cannot_hold_one_request_is_refused_and_nothing_stays_allocated() -> None:
    device = FakeDevice()
    plan = FakePlan(device)
    with pytest.raises(SettingsError, match=r"kv_cache_bytes is 320.*max_model_len 40"):
        TensorRTEngine(plan, device, LIMITS, kv_cache_bytes=10 * KV_BYTES_PER_BLOCK)
    assert not device.allocations
    assert not device.pinned_memory
    assert not device.graphs
    assert plan.closed


def test_a_gpu_without_room_for_the_plans_buffers_is_refused_with_cudas_error() -> None:
    device = FakeDevice(total_bytes=1024)
    with pytest.raises(StartupError, match="Fake H100: cudaMalloc failed with cudaErrorMemoryAllocation"):
        TensorRTEngine(FakePlan(device), device, LIMITS)
    assert not device.allocations


def test_a_plan_that_computes_nothing_is_refused_at_start() -> None:
    device = FakeDevice()
    plan = FakePlan(device)
    plan.step_added = 5
    with pytest.raises(StartupError, match="answered step 5 in place of step 0"):
        TensorRTEngine(plan, device, msgspec.structs.replace(LIMITS, max_num_seqs=2))


# Under the engine core


def generate(server: Server, prompts: dict[str, list[int]], *, num_tokens: int) -> dict[str, list[int]]:
    """Greedy tokens of all requests, by the loop that serves them."""
    config = SchedulerConfig(
        num_blocks=server.executor.pool_info(TIMEOUT_S).num_blocks,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=30,
        max_num_seqs=LIMITS.max_num_seqs,
        max_model_len=LIMITS.max_model_len,
        async_scheduling=True,
    )
    core = EngineCore(Scheduler(config), server.executor, Sampler(), step_timeout_s=TIMEOUT_S)
    for name, prompt in prompts.items():
        core.add_request(Request(name, prompt, SamplingParams(max_tokens=num_tokens, temperature=0.0)))
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    while core.has_work:
        result = core.step()
        assert not result.failures
        for output in result.outputs:
            tokens[output.request.request_id].append(output.token_id)
    return tokens


@pytest.mark.parametrize("num_blocks", [NUM_BLOCKS, 24])
def test_many_requests_get_the_tokens_that_each_would_get_alone(num_blocks: int) -> None:
    """Prompts in chunks, prefix hits, marks and, with few blocks, preemptions."""
    server = serve(kv_cache_bytes=num_blocks * KV_BYTES_PER_BLOCK)
    rng = np.random.default_rng(11)
    shared = rng.integers(0, VOCAB_SIZE, 9).tolist()
    prompts = {
        f"r{i}": [*shared[: 9 * (i % 2)], *rng.integers(0, VOCAB_SIZE, 1 + i % 13).tolist()]
        for i in range(20)
    }
    expected = {}
    for name, prompt in prompts.items():
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(next_token(tokens))
        expected[name] = tokens[len(prompt) :]
    assert generate(server, prompts, num_tokens=12) == expected
    assert server.device.launched
