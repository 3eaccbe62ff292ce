"""The numerics gate sees what an engine does wrong, and its workload stays within the engine's limits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from quire.errors import NumericsGateError
from quire.execution.executor import PoolInfo, StepOutput
from quire.execution.manifest import EngineLimits
from quire.execution.model_inputs import ModelInputs
from quire_build.gate import compare, enforce, gate_workload

VOCAB_SIZE, BLOCK_SIZE = 50, 32
LIMITS = EngineLimits(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=256)
Logits = NDArray[np.float32]


class FakeExecutor:
    """Logits that follow from the token and its position; `distort` makes an engine that gets them wrong."""

    max_in_flight = 1
    token_feedback = False

    def __init__(self, distort: Callable[[Logits, ModelInputs], Logits] | None = None) -> None:
        self._distort = distort

    def pool_info(self, timeout_s: float) -> PoolInfo:
        return PoolInfo(num_blocks=1, epoch=1)

    def submit(self, inputs: ModelInputs) -> FakeStep:
        keys = inputs.input_ids * 1009 + inputs.positions
        logits = np.sin(keys[:, None] * 0.37 + np.arange(VOCAB_SIZE)).astype(np.float32)
        return FakeStep(self._distort(logits, inputs) if self._distort else logits)

    def close(self) -> None: ...


class FakeStep:
    def __init__(self, logits: Logits) -> None:
        self._logits = logits

    def result(self, timeout_s: float) -> StepOutput:
        return StepOutput(self._logits, None, PoolInfo(num_blocks=1, epoch=1))


def _off_by(amount: float) -> Callable[[Logits, ModelInputs], Logits]:
    """One logit of one decode step is wrong."""

    def distort(logits: Logits, inputs: ModelInputs) -> Logits:
        logits = logits.copy()
        row = int(np.argmax(inputs.positions))
        if inputs.positions[row] == 140:
            logits[row, 7] += amount
        return logits

    return distort


def test_an_equal_engine_passes_with_its_figures() -> None:
    report = compare(FakeExecutor(), FakeExecutor(), gate_workload(VOCAB_SIZE, BLOCK_SIZE, LIMITS), "float32")
    assert report.positions > 300
    assert (report.max_abs_logit_error, report.max_abs_probability_error) == (0.0, 0.0)
    assert (report.top1_agreement, report.tolerance) == (1.0, 1e-3)
    enforce(report, "float32")


@pytest.mark.parametrize("amount", [2e-3, -2e-3, float("nan")])
def test_one_wrong_logit_anywhere_fails_the_gate(amount: float) -> None:
    workload = gate_workload(VOCAB_SIZE, BLOCK_SIZE, LIMITS)
    report = compare(FakeExecutor(), FakeExecutor(_off_by(amount)), workload, "float32")
    with pytest.raises(NumericsGateError, match="nothing was published"):
        enforce(report, "float32")


def test_bf16_is_held_to_its_probabilities() -> None:
    workload = gate_workload(VOCAB_SIZE, BLOCK_SIZE, LIMITS)
    report = compare(FakeExecutor(), FakeExecutor(_off_by(0.5)), workload, "bf16")
    assert report.max_abs_logit_error == pytest.approx(0.5, abs=1e-5)
    enforce(report, "bf16")
    workload = gate_workload(VOCAB_SIZE, BLOCK_SIZE, LIMITS)
    report = compare(FakeExecutor(), FakeExecutor(_off_by(20.0)), workload, "bf16")
    assert report.top1_agreement < 1.0
    with pytest.raises(NumericsGateError):
        enforce(report, "bf16")


@pytest.mark.parametrize(
    "limits",
    [
        LIMITS,
        EngineLimits(max_num_seqs=1, max_num_batched_tokens=1, max_model_len=2),
        EngineLimits(max_num_seqs=2, max_num_batched_tokens=3, max_model_len=40),
    ],
)
def test_the_workload_computes_every_position_once_within_the_limits(limits: EngineLimits) -> None:
    workload = gate_workload(VOCAB_SIZE, BLOCK_SIZE, limits)
    computed = 0
    while (inputs := workload.next_step()) is not None:
        lengths = np.diff(inputs.query_start_loc)
        assert 0 < len(lengths) <= limits.max_num_seqs
        assert 0 < len(inputs.input_ids) <= limits.max_num_batched_tokens
        assert inputs.seq_lens.max() <= limits.max_model_len
        rows = np.repeat(np.arange(len(lengths)), lengths)
        blocks = inputs.block_tables[rows, inputs.positions // BLOCK_SIZE]
        assert np.array_equal(inputs.slot_mapping, blocks * BLOCK_SIZE + inputs.positions % BLOCK_SIZE)
        assert blocks.min() > 0 and blocks.max() < workload.num_blocks
        computed += len(inputs.input_ids)
        workload.advance(np.ones((len(inputs.input_ids), VOCAB_SIZE), np.float32))
    # The last new token of a sequence is sampled, never computed.
    assert computed == sum(len(sequence.token_ids) - 1 for sequence in workload.sequences)
