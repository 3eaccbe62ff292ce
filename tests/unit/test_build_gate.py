"""The numerics gate sees what an engine does wrong, and its workload stays within the engine's limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer, models

from quire.errors import BuildError, NumericsGateError
from quire.execution.executor import PoolInfo, StepOutput
from quire.execution.manifest import EngineLimits, GateReport, Precision
from quire.execution.model_inputs import ModelInputs
from quire_build.gate import (
    FP8_KV_THRESHOLDS,
    THRESHOLDS,
    Thresholds,
    compare,
    enforce,
    exceeded,
    gate_workload,
    read_tokens,
    text_workload,
    thresholds,
)

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
        logits = logits[inputs.logits_indices]
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


def _report(precision: Precision, distort: Callable[[Logits, ModelInputs], Logits] | None) -> GateReport:
    workload = gate_workload(VOCAB_SIZE, BLOCK_SIZE, LIMITS)
    return compare(FakeExecutor(), FakeExecutor(distort), workload, THRESHOLDS[precision])


def test_an_equal_engine_passes_with_its_figures() -> None:
    report = _report("float32", None)
    assert report.positions > 300
    assert report.scored_tokens == 6 * 16
    assert (report.max_abs_logit_error, report.max_abs_probability_error) == (0.0, 0.0)
    assert (report.mean_abs_probability_error, report.mean_kl_divergence) == (0.0, 0.0)
    assert (report.top1_agreement, report.perplexity_ratio, report.exceeded) == (1.0, 1.0, ())
    enforce(report, "float32", "float32")


@pytest.mark.parametrize("amount", [2e-3, -2e-3, float("nan")])
def test_one_wrong_logit_anywhere_fails_the_gate(amount: float) -> None:
    report = _report("float32", _off_by(amount))
    assert "max_abs_logit_error" in report.exceeded
    with pytest.raises(NumericsGateError, match="nothing was published"):
        enforce(report, "float32", "float32")


def test_bf16_is_held_to_its_probabilities() -> None:
    report = _report("bf16", _off_by(0.5))
    assert report.max_abs_logit_error == pytest.approx(0.5, abs=1e-5)
    enforce(report, "bf16", "bf16")
    report = _report("bf16", _off_by(20.0))
    assert report.top1_agreement < 1.0
    with pytest.raises(NumericsGateError, match=r"max_abs_probability_error 0\.\d+ \(threshold 0\.2\)"):
        enforce(report, "bf16", "bf16")


def test_force_publishes_what_exceeds_a_threshold_but_not_what_is_no_number() -> None:
    enforce(_report("float32", _off_by(0.5)), "float32", "float32", force=True)
    with pytest.raises(NumericsGateError):
        enforce(_report("float32", _off_by(float("nan"))), "float32", "float32", force=True)


def test_kv_of_few_bits_have_thresholds_of_their_own_and_the_looser_of_two_counts() -> None:
    assert thresholds("bf16", "bf16") == THRESHOLDS["bf16"]
    assert thresholds("bf16", "fp8") == thresholds("int8", "fp8") == FP8_KV_THRESHOLDS
    narrow = Thresholds(0.1, 1e-2, 3e-2, 0.8, 1.01)
    looser = Thresholds(0.7, 1e-2, 3e-2, 0.7, 1.05)
    assert narrow.or_looser(FP8_KV_THRESHOLDS) == FP8_KV_THRESHOLDS.or_looser(narrow) == looser
    report = GateReport(on_text=True, mean_abs_probability_error=1.9e-3, top1_agreement=1.0)
    report = msgspec.structs.replace(report, exceeded=exceeded(report, thresholds("bf16", "fp8")))
    assert report.exceeded == ("mean_abs_probability_error",)
    with pytest.raises(
        NumericsGateError, match=r"than bf16 with KV in fp8 allows: mean.* \(threshold 0\.001\)"
    ):
        enforce(report, "bf16", "fp8")
    enforce(report, "bf16", "fp8", force=True)


def test_the_measures_are_what_they_are_called(tmp_path: Path) -> None:
    """Sharper logits everywhere, over a text: every measure against its definition, sequence by sequence."""
    workload = text_workload(*_text(tmp_path, 1000), BLOCK_SIZE, LIMITS)
    sharper = FakeExecutor(lambda logits, inputs: logits * np.float32(1.5))
    report = compare(FakeExecutor(), sharper, workload, THRESHOLDS["bf16"])
    next_p, next_q, divergences, largest = [], [], [], 0.0
    for sequence in workload.sequences:
        tokens = np.array(sequence.token_ids)
        keys = tokens[:-1] * 1009 + np.arange(len(tokens) - 1)
        logits = np.sin(keys[:, None] * 0.37 + np.arange(VOCAB_SIZE))
        p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, logits * 1.5))
        next_p.append(p[np.arange(len(p)), tokens[1:]])
        next_q.append(q[np.arange(len(q)), tokens[1:]])
        divergences.append((p * np.log(p / q)).sum(-1))
        largest = max(largest, float(np.abs(p - q).max()))
    of_p, of_q = np.concatenate(next_p), np.concatenate(next_q)
    assert report.positions == report.scored_tokens == len(of_p)
    assert report.max_abs_probability_error == pytest.approx(largest, rel=1e-3)
    assert report.mean_abs_probability_error == pytest.approx(np.abs(of_p - of_q).mean(), rel=1e-3)
    assert report.mean_kl_divergence == pytest.approx(np.concatenate(divergences).mean(), rel=1e-3)
    assert report.perplexity_ratio == pytest.approx(np.exp(np.log(of_p / of_q).mean()), rel=1e-3)
    assert report.top1_agreement == 1.0
    assert report.on_text and "mean_abs_probability_error" in report.exceeded
    with pytest.raises(NumericsGateError, match=r"mean_abs_probability_error 0\.\d+ \(threshold 0\.001\)"):
        enforce(report, "bf16", "bf16")


def test_on_random_tokens_the_next_one_is_not_held_to_anything_but_to_be_a_number() -> None:
    sharper = FakeExecutor(lambda logits, inputs: logits * np.float32(1.02))
    report = compare(
        FakeExecutor(), sharper, gate_workload(VOCAB_SIZE, BLOCK_SIZE, LIMITS), THRESHOLDS["bf16"]
    )
    assert report.mean_abs_probability_error > 0 and not report.on_text
    with_text = msgspec.structs.replace(report, mean_abs_probability_error=0.5, perplexity_ratio=2.0)
    assert exceeded(with_text, THRESHOLDS["bf16"]) == ()
    no_number = msgspec.structs.replace(report, mean_abs_probability_error=float("nan"))
    assert exceeded(no_number, THRESHOLDS["bf16"]) == ("mean_abs_probability_error",)


def test_a_text_is_gone_through_piece_by_piece(tmp_path: Path) -> None:
    text, directory = _text(tmp_path, 400)
    workload = text_workload(text, directory, BLOCK_SIZE, LIMITS)
    while (inputs := workload.next_step()) is not None:
        workload.advance(np.zeros((len(inputs.logits_indices), VOCAB_SIZE), np.float32))
    pieces = [token for sequence in workload.sequences for token in sequence.token_ids]
    assert 300 < len(pieces) <= 400
    assert pieces == read_tokens(text, directory)[: len(pieces)]
    with pytest.raises(BuildError, match="8 tokens"):
        text_workload(*_text(tmp_path, 8), BLOCK_SIZE, LIMITS)
    with pytest.raises(BuildError, match="absent"):
        text_workload(tmp_path / "absent", tmp_path, BLOCK_SIZE, LIMITS)


def test_rows_of_logits_are_limited_and_each_sequence_keeps_its_last(tmp_path: Path) -> None:
    unlimited = text_workload(*_text(tmp_path, 1000), BLOCK_SIZE, LIMITS)
    limited = text_workload(*_text(tmp_path, 1000), BLOCK_SIZE, LIMITS, max_logits_rows=8)

    while (inputs := limited.next_step()) is not None:
        everything = unlimited.next_step()
        assert everything is not None and np.array_equal(everything.input_ids, inputs.input_ids)
        rows = inputs.logits_indices
        assert len(rows) == min(8, len(inputs.input_ids)) and np.all(np.diff(rows) > 0)
        assert set(inputs.query_start_loc[1:] - 1) <= set(rows)
        of_all = unlimited.advance(np.zeros((len(inputs.input_ids), VOCAB_SIZE), np.float32))
        following = limited.advance(np.zeros((len(rows), VOCAB_SIZE), np.float32))
        assert np.array_equal(following, of_all[rows])
    assert unlimited.next_step() is None


def _text(directory: Path, num_tokens: int) -> tuple[Path, Path]:
    """A text of so many tokens, and the directory of its tokenizer."""
    vocabulary = {chr(65 + number): number for number in range(VOCAB_SIZE)}
    Tokenizer(models.BPE(vocabulary, [])).save(str(directory / "tokenizer.json"))
    text = directory / "text.txt"
    numbers = np.random.default_rng(5).integers(VOCAB_SIZE, size=num_tokens)
    text.write_text("".join(chr(65 + number) for number in numbers))
    return text, directory


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
