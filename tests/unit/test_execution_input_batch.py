from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quire.errors import EngineStepError
from quire.execution.input_batch import InputBatch, PreparedStep, patch
from quire.execution.manifest import EngineLimits
from quire.execution.model_inputs import InputsCheck, ModelInputs
from quire.execution.philox import uniforms
from quire.execution.sampler import SMALLEST_TEMPERATURE
from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler_output import SchedulerOutput

BLOCK_SIZE = 4
LIMITS = EngineLimits(max_num_seqs=3, max_num_batched_tokens=16, max_model_len=20)
CHECK = InputsCheck(vocab_size=1000, block_size=BLOCK_SIZE, num_blocks=30, limits=LIMITS)


def make_batch(*, sampled_by_engine: bool = False) -> InputBatch:
    return InputBatch(
        LIMITS.max_num_seqs,
        LIMITS.max_num_batched_tokens,
        LIMITS.max_model_len,
        BLOCK_SIZE,
        sampled_by_engine=sampled_by_engine,
    )


def request(name: str, prompt: list[int], parameters: SamplingParams | None = None) -> Request:
    return Request(name, prompt, parameters or SamplingParams(temperature=0.0))


def output(
    spans: list[tuple[Request, int, int]],
    *,
    sampling: list[int],
    new: dict[str, list[int]] | None = None,
    resumed: dict[str, list[int]] | None = None,
    grown: dict[str, list[int]] | None = None,
    finished: list[str] | None = None,
    preempted: list[Request] | None = None,
) -> SchedulerOutput:
    """A step of requests with their tokens computed before and computed now."""
    by_name = {request.request_id: request for request, _, _ in spans}
    return SchedulerOutput(
        requests=[request for request, _, _ in spans],
        num_computed_tokens=[computed for _, computed, _ in spans],
        num_scheduled_tokens=[count for _, _, count in spans],
        sampling=sampling,
        total_num_scheduled_tokens=sum(count for _, _, count in spans),
        new_requests=[by_name[name] for name in new or {}],
        resumed_requests=[by_name[name] for name in resumed or {}],
        new_block_ids={**(new or {}), **(resumed or {}), **(grown or {})},
        finished_request_ids=finished or [],
        preempted_requests=preempted or [],
    )


def prepare(batch: InputBatch, scheduled: SchedulerOutput) -> PreparedStep:
    batch.update_rows(scheduled)
    return batch.prepare(scheduled)


def ids(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def as_lists(inputs: ModelInputs) -> dict[str, list[Any]]:
    return {
        name: getattr(inputs, name).tolist()
        for name in (
            "input_ids",
            "positions",
            "slot_mapping",
            "block_tables",
            "query_start_loc",
            "seq_lens",
            "logits_indices",
        )
    }


def test_a_prompt_in_chunks_beside_a_whole_one_is_packed_as_the_contract_says() -> None:
    first, second = request("a", list(range(100, 110))), request("b", [7, 8])
    batch = make_batch()
    step = prepare(batch, output([(first, 0, 6), (second, 0, 2)], sampling=[1], new={"a": [5, 3], "b": [9]}))
    assert as_lists(step.inputs) == {
        "input_ids": [100, 101, 102, 103, 104, 105, 7, 8],
        "positions": [0, 1, 2, 3, 4, 5, 0, 1],
        "slot_mapping": [20, 21, 22, 23, 12, 13, 36, 37],
        "block_tables": [[5, 3], [9, 0]],
        "query_start_loc": [0, 6, 8],
        "seq_lens": [6, 2],
        "logits_indices": [7],
    }
    CHECK(step.inputs)
    batch.record(step, ids(42))
    step = prepare(batch, output([(first, 6, 4), (second, 2, 1)], sampling=[0, 1], grown={"a": [11]}))
    assert as_lists(step.inputs) == {
        "input_ids": [106, 107, 108, 109, 42],
        "positions": [6, 7, 8, 9, 2],
        "slot_mapping": [14, 15, 44, 45, 38],
        "block_tables": [[5, 3, 11], [9, 0, 0]],
        "query_start_loc": [0, 4, 5],
        "seq_lens": [10, 3],
        "logits_indices": [3, 4],
    }
    CHECK(step.inputs)


def test_tables_are_only_as_wide_as_the_step_needs() -> None:
    long, short = request("long", list(range(17))), request("short", [1])
    batch = make_batch()
    new = {"long": [1, 2, 3, 4, 5], "short": [6]}
    assert prepare(
        batch, output([(long, 0, 5), (short, 0, 1)], sampling=[1], new=new)
    ).inputs.block_tables.shape == (2, 2)
    assert prepare(batch, output([(short, 1, 1)], sampling=[0])).inputs.block_tables.shape == (1, 1)


def test_ids_that_are_not_known_yet_are_marked_and_filled_in() -> None:
    first, second, third = request("a", [1, 2]), request("b", [3]), request("c", [4, 5, 6])
    batch = make_batch()
    new = {"a": [1], "b": [2], "c": [3]}
    running = prepare(batch, output([(first, 0, 2), (second, 0, 1), (third, 0, 2)], sampling=[0, 1], new=new))
    upcoming = prepare(batch, output([(third, 2, 1), (second, 1, 1), (first, 2, 1)], sampling=[0, 1, 2]))
    assert upcoming.inputs.input_ids.tolist() == [6, -2, -1]
    assert running.inputs.input_ids.tolist() == [1, 2, 3, 4, 5]
    batch.record(running, ids(50, 60))
    patch(upcoming.inputs, ids(50, 60))
    assert upcoming.inputs.input_ids.tolist() == [6, 60, 50]
    batch.record(upcoming, ids(70, 80, 90))
    last = prepare(batch, output([(first, 3, 1), (second, 2, 1), (third, 3, 1)], sampling=[0, 1, 2]))
    assert last.inputs.input_ids.tolist() == [90, 80, 70]


def test_a_request_that_sits_out_a_step_goes_on_with_its_token() -> None:
    first, second = request("a", [1]), request("b", [2])
    batch = make_batch()
    running = prepare(
        batch, output([(first, 0, 1), (second, 0, 1)], sampling=[0, 1], new={"a": [1], "b": [2]})
    )
    upcoming = prepare(batch, output([(first, 1, 1)], sampling=[0]))
    batch.record(running, ids(50, 60))
    patch(upcoming.inputs, ids(50, 60))
    batch.record(upcoming, ids(51))
    last = prepare(batch, output([(second, 1, 1), (first, 2, 1)], sampling=[0, 1]))
    assert last.inputs.input_ids.tolist() == [60, 51]


def test_a_resumed_request_starts_over_with_the_table_that_it_is_given() -> None:
    first = request("a", [1, 2, 3, 4, 5])
    batch = make_batch()
    step = prepare(batch, output([(first, 0, 5)], sampling=[0], new={"a": [1, 2]}))
    batch.record(step, ids(6))
    first.all_token_ids.append(6)
    prepare(
        batch, output([(other := request("b", [9]), 0, 1)], sampling=[0], new={"b": [2]}, preempted=[first])
    )
    step = prepare(batch, output([(other, 1, 1), (first, 4, 2)], sampling=[0, 1], resumed={"a": [1, 7]}))
    batch.record(step, ids(10, 11))
    assert step.inputs.input_ids.tolist()[1:] == [5, 6]
    assert step.inputs.block_tables.tolist() == [[2, 0], [1, 7]]


def test_rows_of_ended_requests_are_used_again_and_nothing_of_them_is_left() -> None:
    batch = make_batch()
    finished: list[str] = []
    for turn in range(10):
        blocks = [turn + 1] if turn % 2 else [turn + 1, 20, 21, 22, 23]
        prompt = [turn] * (4 * len(blocks) - 1)
        spans = [(request(str(turn), prompt), 0, min(16, len(prompt)))]
        step = prepare(batch, output(spans, sampling=[], new={str(turn): blocks}, finished=finished))
        CHECK(step.inputs)
        finished = [str(turn)]
    spans = [(request(name, [1]), 0, 1) for name in ("x", "y", "z")]
    step = prepare(
        batch, output(spans, sampling=[], new={"x": [1], "y": [2], "z": [3]}, finished=["9", "never ran"])
    )
    assert step.inputs.block_tables.tolist() == [[1], [2], [3]]


def test_a_step_stays_as_it_is_while_the_next_one_is_prepared() -> None:
    batch = make_batch(sampled_by_engine=True)
    first = request("a", [1, 2, 3], SamplingParams(seed=3))
    step = prepare(batch, output([(first, 0, 3)], sampling=[0], new={"a": [1]}))
    assert step.inputs.sampling is not None
    before, sampling_before = as_lists(step.inputs), step.inputs.sampling.tolist()
    prepare(batch, output([(first, 3, 1)], sampling=[0]))
    assert as_lists(step.inputs) == before
    assert step.inputs.sampling.tolist() == sampling_before


def test_sampling_parameters_go_with_the_rows_that_sample() -> None:
    greedy = request("g", [1])
    drawn = request(
        "d", [2, 3], SamplingParams(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=2**64 - 1)
    )
    cold = request("c", [4], SamplingParams(temperature=1e-30))
    batch = make_batch()
    spans = [(greedy, 0, 1), (cold, 0, 1), (drawn, 0, 2)]
    step = prepare(batch, output(spans, sampling=[0, 2], new={"g": [1], "d": [2], "c": [3]}))
    sampling = step.sampling
    assert sampling.inverse_temperature.tolist() == [0, 2]
    assert (sampling.top_k[1], sampling.top_p[1], sampling.min_p[1]) == (7, np.float32(0.9), np.float32(0.1))
    assert sampling.seed[1] == 2**64 - 1
    assert sampling.output_index.tolist() == [0, 0]
    step = prepare(batch, output([(cold, 0, 1), (drawn, 2, 1)], sampling=[0, 1]))
    assert step.sampling.inverse_temperature.tolist() == pytest.approx([1 / SMALLEST_TEMPERATURE, 2])
    assert step.sampling.output_index.tolist() == [0, 1]


def test_an_engine_that_samples_gets_what_the_sampler_would_go_by() -> None:
    greedy = request("g", [1])
    drawn = request("d", [2, 3], SamplingParams(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=12))
    batch = make_batch(sampled_by_engine=True)
    spans = [(greedy, 0, 1), (drawn, 0, 2)]
    step = prepare(batch, output(spans, sampling=[0, 1], new={"g": [1], "d": [2]}))
    first, second = uniforms(np.array([12, 12], np.uint64), np.array([0, 1])).tolist()
    parameters = np.array([2, 7, 0.9, 0.1], np.float32).tolist()
    assert step.inputs.sampling is not None
    assert step.inputs.sampling.dtype == np.float32
    assert step.inputs.sampling.flags.c_contiguous
    assert step.inputs.sampling.tolist() == [[0, 0, 1, 0, 0], [*parameters, first]]
    step = prepare(batch, output([(drawn, 2, 1)], sampling=[0]))
    assert step.inputs.sampling is not None
    assert step.inputs.sampling.tolist() == [[*parameters, second]]
    assert (
        prepare(make_batch(), output(spans, sampling=[1], new={"g": [1], "d": [2]})).inputs.sampling is None
    )


def decode_step(input_ids: list[int], *, sampling: NDArray[np.float32] | None = None) -> ModelInputs:
    """Sequences of one token each."""
    spans = [(request(str(index), [token_id]), 0, 1) for index, token_id in enumerate(input_ids)]
    new = {str(index): [index + 1] for index in range(len(input_ids))}
    inputs = prepare(make_batch(), output(spans, sampling=list(range(len(spans))), new=new)).inputs
    inputs.sampling = sampling
    return inputs


def test_marks_are_for_rows_that_the_step_before_sampled() -> None:
    CHECK(decode_step([5, -2, -1]), num_sampled_before=2)
    with pytest.raises(EngineStepError, match=r"contains -3; it must be 0 to 999, or -2 to -1 for a row of"):
        CHECK(decode_step([5, -3, -1]), num_sampled_before=2)
    with pytest.raises(EngineStepError, match=r"input_ids contains -1; it must be 0 to 999$"):
        CHECK(decode_step([5, -1]))
    with pytest.raises(EngineStepError, match=r"input_ids contains 1000"):
        CHECK(decode_step([1000, -1]), num_sampled_before=2)


def test_sampling_has_a_row_of_five_for_each_row_of_logits() -> None:
    CHECK(decode_step([5, 6], sampling=np.zeros((2, 5), np.float32)))
    with pytest.raises(EngineStepError, match=r"sampling has shape \[1, 5\]; it must have shape \[2, 5\]"):
        CHECK(decode_step([5, 6], sampling=np.zeros((1, 5), np.float32)))
