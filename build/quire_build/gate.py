"""The numerics gate: is the built engine the same function as the torch module it was made from?

Both run the same fixed workload: prefill in chunks, decode, several sequences at once, shuffled block
tables, logits of every position. What the gate finds goes into engine.json; beyond the tolerance nothing is
published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from quire.errors import NumericsGateError
from quire.execution.executor import Executor
from quire.execution.manifest import EngineLimits, GateReport
from quire.execution.model_inputs import ModelInputs
from quire_build.workload import Workload

Precision = Literal["float32", "bf16"]

LOGIT_TOLERANCE = 1e-3
"""float32: largest difference of a logit."""
PROBABILITY_TOLERANCE = 0.2
"""bf16: largest difference of a token's probability. With 8 bits of mantissa a bound on logits would depend
on the model's scale; what sampling sees does not. Rounding alone was measured at 0.04 (random weights) and
0.07 (the project's own checkpoint); a wrong block or position comes close to 1."""

TOLERANCES: Mapping[Precision, float] = {"float32": LOGIT_TOLERANCE, "bf16": PROBABILITY_TOLERANCE}

PROMPT_LENGTHS = (5, 70, 33, 128, 1, 64)
"""Tokens: below, at and above multiples of the block size and of the workload's chunk."""
NUM_NEW_TOKENS = 16
STEP_TIMEOUT_S = 600.0


def gate_workload(vocab_size: int, block_size: int, limits: EngineLimits) -> Workload:
    """The gate's workload, cut to what the engine is built for."""
    new_tokens = min(NUM_NEW_TOKENS, limits.max_model_len - 1)
    random = np.random.default_rng(20260101)
    prompts = [
        random.integers(vocab_size, size=min(length, limits.max_model_len - new_tokens)).tolist()
        for length in PROMPT_LENGTHS
    ]
    return Workload(
        prompts,
        num_new_tokens=new_tokens,
        block_size=block_size,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
    )


def compare(reference: Executor, engine: Executor, workload: Workload, precision: Precision) -> GateReport:
    """Run the workload on both; the reference's tokens are what both go on with."""
    positions = agreeing = 0
    logit_error = probability_error = 0.0
    while (inputs := workload.next_step()) is not None:
        expected, actual = _logits(reference, inputs), _logits(engine, inputs)
        logit_error = _largest(expected - actual, logit_error)
        probability_error = _largest(_softmax(expected) - _softmax(actual), probability_error)
        agreeing += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        positions += len(expected)
        workload.advance(expected)
    return GateReport(
        positions=positions,
        max_abs_logit_error=logit_error,
        max_abs_probability_error=probability_error,
        top1_agreement=agreeing / positions,
        tolerance=TOLERANCES[precision],
    )


def _logits(executor: Executor, inputs: ModelInputs) -> NDArray[np.float32]:
    logits = executor.submit(inputs).result(STEP_TIMEOUT_S).logits
    assert logits is not None, "a step without `sampling` returns its logits"
    return logits


def enforce(report: GateReport, precision: Precision) -> None:
    """Refuse an engine that differs by more than the tolerance, or by what is not a number.

    Raises:
        NumericsGateError: it does.
    """
    quantity, error = (
        ("logit", report.max_abs_logit_error)
        if precision == "float32"
        else ("probability", report.max_abs_probability_error)
    )
    if not error <= report.tolerance:
        raise NumericsGateError(
            f"the engine differs from the torch module: max |delta {quantity}| is {error:.3g}, more than "
            f"{precision} allows; nothing was published. Measured: {describe(report)}"
        )


def describe(report: GateReport) -> str:
    """The figures in one line."""
    return (
        f"max |delta logit| {report.max_abs_logit_error:.2e}, "
        f"max |delta probability| {report.max_abs_probability_error:.2e}, "
        f"top-1 agreement {report.top1_agreement:.2%} over {report.positions} positions "
        f"(tolerance {report.tolerance:g})"
    )


def _largest(difference: NDArray[np.float32], so_far: float) -> float:
    """The larger absolute value; NaN, once met, stays."""
    return float(np.maximum(so_far, np.abs(difference).max()))


def _softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities: NDArray[np.float32] = shifted / shifted.sum(-1, keepdims=True)
    return probabilities
