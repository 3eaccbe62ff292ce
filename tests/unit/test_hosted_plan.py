"""Steps by BLS calls to a plan that Triton's own backend hosts: two under way, one call at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.unit.test_build_repository import plan_manifest
from tests.unit.triton_stand_in import (
    InferenceResponse,
    StandIn,
    Tensor,
    TritonError,
    TritonModelError,
    inside_triton,
)

from quire.errors import EngineStepError, PeerLostError
from quire.execution.engine_state import STEP_MARK
from quire.execution.model_inputs import ModelInputs
from quire_build.repository import plan_config

PATIENCE_S = 30
VOCAB_SIZE = 1000
MANIFEST = plan_manifest()
TABLE_WIDTH = 7
"""Blocks of a request of full length."""


@dataclass
class HostedPlan:
    """What Triton's backend and a plan do together: inputs are kept, ids are fed back, the epoch is stored.

    The token sampled from a row is the token that the row belongs to, plus one. Rows of padding are garbage.
    """

    triton: StandIn
    calls: list[dict[str, NDArray[Any]]] = field(default_factory=list)
    failure: str | None = None
    hold: threading.Event | None = None
    """Calls return once it is set."""
    under_way: threading.Event = field(default_factory=threading.Event)
    num_running: int = 0
    epoch: int = 0
    sampled_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))

    def __post_init__(self) -> None:
        self.triton.answer = self._answer

    def reload(self) -> None:
        self.epoch = 0
        self.sampled_ids = np.zeros(0, np.int32)

    def _answer(self, model_name: str, arrays: dict[str, NDArray[Any]]) -> InferenceResponse:
        assert model_name == "engine"
        self.num_running += 1
        assert self.num_running == 1, "calls under way together may swap"
        hold = self.hold
        self.calls.append({name: array.copy() for name, array in arrays.items()})
        self.under_way.set()
        if hold is not None:
            hold.wait(PATIENCE_S)
        self.num_running -= 1
        if self.failure is not None:
            return InferenceResponse(failure=TritonError(self.failure, 0))
        if self.epoch == 0:
            self.epoch = int(arrays["step"][1])
        _, _, mark, num_tokens, num_rows = arrays["step"].tolist()
        assert mark == STEP_MARK
        ids = arrays["input_ids"][:num_tokens].copy()
        marked = ids < 0
        ids[marked] = self.sampled_ids[-1 - ids[marked]]
        self.sampled_ids = ids[arrays["logits_indices"][:num_rows]] + 1
        all_rows = len(arrays["logits_indices"])
        logits = np.full((all_rows, VOCAB_SIZE), np.nan, np.float32)
        logits[:num_rows] = 0
        logits[np.arange(num_rows), self.sampled_ids] = 1
        sampled_ids = np.full(all_rows, -77, np.int32)
        sampled_ids[:num_rows] = self.sampled_ids
        outputs = {
            "logits": logits,
            "sampled_ids": sampled_ids,
            "pool_info": np.array([arrays["engine_state"][0], self.epoch], np.int32),
            "step_done": arrays["step"][:1],
        }
        asked_for = self.triton.asked_for
        return InferenceResponse([Tensor(name, outputs[name]) for name in asked_for])


@pytest.fixture
def served() -> Iterator[tuple[HostedPlan, Any]]:
    with inside_triton("scheduler.hosted_plan") as (triton, [module]):
        plan = HostedPlan(triton)
        executor = module.HostedPlanExecutor(MANIFEST)
        yield plan, executor
        if plan.hold is not None:
            plan.hold.set()
        executor.close()


def decode(number: int, tokens: list[int]) -> ModelInputs:
    """A step of one token for each sequence, all of which sample."""
    size = len(tokens)
    return ModelInputs(
        step=number,
        input_ids=np.array(tokens, np.int32),
        positions=np.full(size, 20, np.int32),
        slot_mapping=np.arange(size, dtype=np.int32) + 36,
        block_tables=np.full((size, 2), 5, np.int32),
        query_start_loc=np.arange(size + 1, dtype=np.int32),
        seq_lens=np.full(size, 21, np.int32),
        logits_indices=np.arange(size, dtype=np.int32),
        sampling=np.full((size, 5), 0.5, np.float32),
    )


def prefill(number: int, num_tokens: int, *, samples: bool) -> ModelInputs:
    """A step of one sequence with many tokens."""
    rows = 1 if samples else 0
    return ModelInputs(
        step=number,
        input_ids=np.arange(num_tokens, dtype=np.int32),
        positions=np.arange(num_tokens, dtype=np.int32),
        slot_mapping=np.arange(num_tokens, dtype=np.int32) + 16,
        block_tables=np.array([[1, 2]], np.int32),
        query_start_loc=np.array([0, num_tokens], np.int32),
        seq_lens=np.array([num_tokens], np.int32),
        logits_indices=np.full(rows, num_tokens - 1, np.int32),
        sampling=np.full((rows, 5), 0.5, np.float32),
    )


def test_a_call_has_the_manifests_inputs_with_the_types_that_triton_was_told(
    served: tuple[HostedPlan, Any],
) -> None:
    plan, executor = served
    pool = executor.pool_info(PATIENCE_S)
    assert pool.num_blocks == 90 and pool.epoch >= 1
    executor.submit(decode(7, [5, 6, 8])).result(PATIENCE_S)
    executor.submit(prefill(8, 20, samples=True)).result(PATIENCE_S)
    for sent in plan.calls:
        assert tuple(sent) == MANIFEST.inputs
        types = {tensor.name: tensor.data_type for tensor in plan_config(MANIFEST).input}
        numbers = {"int32": 8, "int64": 9, "float32": 11}  # TYPE_INT32, TYPE_INT64, TYPE_FP32
        assert {name: numbers[array.dtype.name] for name, array in sent.items()} == types
        assert sent["engine_state"].tolist() == [90]
        assert sent["kv_cache.0"].tolist() == sent["kv_cache.1"].tolist() == [0]


def mixed(number: int, query_lens: list[int]) -> ModelInputs:
    """A step of so many tokens for each sequence, the last of which sample."""
    starts = np.array([0, *np.cumsum(query_lens)], np.int32)
    tokens, size = int(starts[-1]), len(query_lens)
    return ModelInputs(
        step=number,
        input_ids=np.arange(10, 10 + tokens, dtype=np.int32),
        positions=np.arange(1, 1 + tokens, dtype=np.int32),
        slot_mapping=np.arange(tokens, dtype=np.int32) + 36,
        block_tables=np.full((size, 2), 5, np.int32),
        query_start_loc=starts,
        seq_lens=np.array(query_lens, np.int32) + 4,
        logits_indices=starts[1:] - 1,
        sampling=np.full((size, 5), 0.5, np.float32),
    )


@pytest.mark.parametrize(
    ("query_lens", "size"),
    [
        ([1], 1),
        ([1] * 3, 4),
        ([1] * 9, 12),
        ([1] * 12, 12),
        ([13], 16),
        ([1, 1, 7], 12),
        ([1, 50, 2], 64),
        ([60, 5], 300),
        ([300], 300),
    ],
    ids=str,
)
def test_every_step_has_the_shapes_of_a_captured_graph(
    served: tuple[HostedPlan, Any], query_lens: list[int], size: int
) -> None:
    plan, executor = served
    inputs = mixed(7, query_lens)
    output = executor.submit(inputs).result(PATIENCE_S)
    np.testing.assert_array_equal(output.sampled_ids, inputs.input_ids[inputs.logits_indices] + 1)
    assert output.logits is None
    [sent] = plan.calls
    specs = plan_config(MANIFEST).optimization.cuda.graph_spec
    graphs = [{name: tuple(shape.dim) for name, shape in spec.input.items()} for spec in specs]
    shapes = {name: array.shape for name, array in sent.items()}
    assert shapes in graphs and shapes["input_ids"] == (size,)
    seqs, tokens = len(query_lens), sum(query_lens)
    assert sent["step"][2:].tolist() == [STEP_MARK, tokens, seqs]
    np.testing.assert_array_equal(sent["input_ids"][:tokens], inputs.input_ids)
    np.testing.assert_array_equal(sent["block_tables"][:seqs, :2], 5)
    assert not sent["block_tables"][seqs:].any() and not sent["block_tables"][:, 2:].any()
    np.testing.assert_array_equal(sent["sampling"][:seqs], 0.5)
    assert not sent["sampling"][seqs:].any()
    np.testing.assert_array_equal(sent["query_start_loc"][: seqs + 1], inputs.query_start_loc)
    np.testing.assert_array_equal(sent["query_start_loc"][seqs + 1 :], tokens)
    np.testing.assert_array_equal(sent["seq_lens"][seqs:], 0)
    for name in ("input_ids", "positions", "slot_mapping"):
        np.testing.assert_array_equal(sent[name][tokens:], 0)


def test_a_step_that_samples_nothing_says_that_all_its_rows_are_padding(
    served: tuple[HostedPlan, Any],
) -> None:
    plan, executor = served
    output = executor.submit(prefill(7, 20, samples=False)).result(PATIENCE_S)
    assert output.sampled_ids.shape == (0,)
    [sent] = plan.calls
    assert sent["step"].tolist()[3:] == [20, 0]
    assert not sent["logits_indices"].any() and not sent["sampling"].any()


@pytest.mark.parametrize("inputs", [decode(7, [5, 6, 8]), prefill(7, 20, samples=True)])
def test_logits_come_only_where_they_are_asked_for(
    served: tuple[HostedPlan, Any], inputs: ModelInputs
) -> None:
    _, executor = served
    output = executor.submit(replace(inputs, sampling=None)).result(PATIENCE_S)
    assert output.sampled_ids is None
    assert output.logits.shape == (len(inputs.logits_indices), VOCAB_SIZE)
    np.testing.assert_array_equal(output.logits.argmax(axis=1), inputs.input_ids[inputs.logits_indices] + 1)


def test_a_step_is_submitted_before_the_one_before_has_returned_and_takes_its_tokens(
    served: tuple[HostedPlan, Any],
) -> None:
    plan, executor = served
    plan.hold = threading.Event()
    first = executor.submit(decode(1, [10, 20]))
    second = executor.submit(decode(2, [-2, -1, 30]))
    assert plan.under_way.wait(PATIENCE_S)
    assert len(plan.calls) == 1
    plan.hold.set()
    np.testing.assert_array_equal(first.result(PATIENCE_S).sampled_ids, [11, 21])
    np.testing.assert_array_equal(second.result(PATIENCE_S).sampled_ids, [22, 12, 31])
    assert [call["step"][0] for call in plan.calls] == [1, 2]


def test_a_reloaded_plan_has_another_epoch_though_nobody_asked(served: tuple[HostedPlan, Any]) -> None:
    plan, executor = served
    pool = executor.pool_info(PATIENCE_S)
    assert executor.submit(decode(1, [10])).result(PATIENCE_S).pool_info == pool
    plan.reload()
    epoch = executor.submit(decode(2, [10])).result(PATIENCE_S).pool_info.epoch
    assert epoch != pool.epoch
    assert executor.pool_info(PATIENCE_S).epoch == epoch


def test_a_failed_step_takes_the_one_behind_it_along(served: tuple[HostedPlan, Any]) -> None:
    plan, executor = served
    plan.hold, plan.failure = threading.Event(), "enqueue failed"
    first, second = executor.submit(decode(1, [10])), executor.submit(decode(2, [-1]))
    plan.hold.set()
    for step in (first, second):
        with pytest.raises(EngineStepError, match="enqueue failed"):
            step.result(PATIENCE_S)
    plan.failure = None
    executor.pool_info(PATIENCE_S)
    assert [call["step"][0] for call in plan.calls] == [1, 0]
    np.testing.assert_array_equal(executor.submit(decode(3, [10])).result(PATIENCE_S).sampled_ids, [11])


def test_asking_for_the_pool_waits_for_the_call_of_a_step_that_was_given_up(
    served: tuple[HostedPlan, Any],
) -> None:
    plan, executor = served
    plan.hold = threading.Event()
    first, second = executor.submit(decode(1, [10])), executor.submit(decode(2, [-1]))
    assert plan.under_way.wait(PATIENCE_S)
    with pytest.raises(EngineStepError, match=r"longer than 0.01 s"):
        first.result(0.01)
    with pytest.raises(EngineStepError):
        second.result(PATIENCE_S)
    with pytest.raises(PeerLostError, match="does not answer"):
        executor.pool_info(0.01)
    plan.hold.set()
    executor.pool_info(PATIENCE_S)
    # The second was never called: it waited for tokens that nobody knows.
    assert [call["step"][0] for call in plan.calls] == [1, 0]


def test_an_answer_to_another_step_is_an_error(served: tuple[HostedPlan, Any]) -> None:
    plan, executor = served
    answer = plan.triton.answer
    plan.triton.answer = lambda model, arrays: answer(
        model, {**arrays, "step": arrays["step"] - np.array([1, 0, 0, 0, 0], np.int32)}
    )
    with pytest.raises(EngineStepError, match="answered step 6 in place of step 7"):
        executor.submit(decode(7, [10])).result(PATIENCE_S)


def test_the_engine_is_waited_for_while_it_loads(served: tuple[HostedPlan, Any]) -> None:
    plan, executor = served
    answer = plan.triton.answer

    refusals = iter(range(3))

    def refuse(model_name: str, arrays: dict[str, NDArray[Any]]) -> InferenceResponse:
        if next(refusals, None) is None:
            return answer(model_name, arrays)
        raise TritonModelError("model engine is not ready")

    plan.triton.answer = refuse
    assert executor.pool_info(PATIENCE_S).num_blocks == 90
    assert next(refusals, None) is None
    assert len(plan.calls) == 1


def test_the_log_tells_why_the_engine_has_been_silent_for_long(
    served: tuple[HostedPlan, Any], caplog: pytest.LogCaptureFixture
) -> None:
    plan, executor = served
    answer = plan.triton.answer
    refusals = iter(range(3))

    def refuse_for_a_while(model_name: str, arrays: dict[str, NDArray[Any]]) -> InferenceResponse:
        refusal = next(refusals, None)
        if refusal is None:
            return answer(model_name, arrays)
        if refusal == 2:
            executor._complain_after_s = 0.0  # as if it had been silent for long
        raise TritonModelError("model engine is not ready")

    plan.triton.answer = refuse_for_a_while
    executor.pool_info(PATIENCE_S)
    assert len(caplog.records) == 1, "not at once"
    assert "has not answered for" in caplog.text and "model engine is not ready" in caplog.text
    caplog.clear()
    refusals = iter(range(1))
    executor.pool_info(PATIENCE_S)
    assert not caplog.records, "after an answer patience begins anew"


def test_closing_ends_what_is_under_way_and_whatever_comes_later(served: tuple[HostedPlan, Any]) -> None:
    plan, executor = served
    plan.hold = threading.Event()
    steps = [executor.submit(decode(1, [10])), executor.submit(decode(2, [-1]))]
    executor.close()
    steps.append(executor.submit(decode(3, [10])))
    for step in steps:
        with pytest.raises(PeerLostError, match="stopping"):
            step.result(PATIENCE_S)
    with pytest.raises(PeerLostError, match="stopping"):
        executor.pool_info(PATIENCE_S)
