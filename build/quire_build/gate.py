"""The numerics gate: is the built engine the same function as the torch module it was made from?

Both run the same fixed workload: prefill in chunks, decode, several sequences at once, shuffled block
tables. The tokens are a text's, if one is given, else random prompts with the reference's own greedy
continuations. What the gate finds goes into engine.json; beyond a threshold nothing is published, unless
that is forced. docs/precision.md defines the measures and says where the thresholds come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from quire.errors import BuildError, NumericsGateError
from quire.execution.executor import Executor
from quire.execution.manifest import EngineLimits, GateReport, KvCacheDtype, Precision
from quire.execution.model_inputs import ModelInputs
from quire.text.tokenizer import Tokenizer
from quire_build.workload import Workload


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The most (of the agreement, the least) that a precision may come to.

    With few bits of mantissa a bound on logits would depend on the model's scale; what sampling sees does
    not, so all but float32 are held to probabilities.
    """

    max_abs_probability_error: float
    mean_abs_probability_error: float
    mean_kl_divergence: float
    top1_agreement: float
    perplexity_ratio: float
    """At most this, and at least its inverse."""
    max_abs_logit_error: float = math.inf

    def or_looser(self, other: Thresholds) -> Thresholds:
        """Of each measure the looser one."""
        agreement = min(self.top1_agreement, other.top1_agreement)
        measures = (field.name for field in fields(self))
        looser = {name: max(getattr(self, name), getattr(other, name)) for name in measures}
        return Thresholds(**looser | {"top1_agreement": agreement})


_INT8 = Thresholds(0.5, 1e-3, 5e-3, 0.75, 1.02)
_FP8 = Thresholds(0.7, 1e-3, 2e-2, 0.7, 1.05)
THRESHOLDS: Mapping[Precision, Thresholds] = {
    "float32": Thresholds(1e-3, 1e-5, 1e-6, 0.99, 1.001, max_abs_logit_error=1e-3),
    "bf16": Thresholds(0.2, 1e-3, 1e-3, 0.8, 1.01),
    "fp16": Thresholds(0.05, 1e-3, 1e-4, 0.95, 1.005),
    "int8": _INT8,
    "fp8": _FP8,
    "int8-weights": _INT8,
    "fp8-weights": _FP8,
}
FP8_KV_THRESHOLDS = _FP8
"""Of engines whose pool is of e4m3."""

PROMPT_LENGTHS = (5, 70, 33, 128, 1, 64)
"""Tokens: below, at and above multiples of the block size and of the workload's chunk."""
NUM_NEW_TOKENS = 16
TEXT_PROMPT_LENGTHS = (*PROMPT_LENGTHS, *(240,) * 8)
"""The last of these arrive together and fill large steps."""
TEXT_CHUNK = 150
STEP_TIMEOUT_S = 600.0


def gate_workload(
    vocab_size: int, block_size: int, limits: EngineLimits, *, max_logits_rows: int | None = None
) -> Workload:
    """The gate's workload without a text, cut to what the engine is built for.

    Args:
        vocab_size: random tokens are below it.
        block_size: tokens in a block.
        limits: of the engine.
        max_logits_rows: rows of logits that the engine returns in one step at most; None for no limit.
    """
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
        max_logits_rows=max_logits_rows,
    )


def text_workload(
    text: Path,
    tokenizer_directory: Path,
    block_size: int,
    limits: EngineLimits,
    *,
    max_logits_rows: int | None = None,
) -> Workload:
    """The gate's workload over consecutive pieces of a text, as many as it has.

    Args:
        text: UTF-8. Special tokens written in it (the end of one document, the beginning of the next) count
            as such.
        tokenizer_directory: the checkpoint, whose tokenizer reads the text.
        block_size: tokens in a block.
        limits: of the engine.
        max_logits_rows: rows of logits that the engine returns in one step at most; None for no limit.

    Raises:
        BuildError: the file cannot be read, or its text is too short for one piece.
    """
    token_ids = read_tokens(text, tokenizer_directory)
    new_tokens = min(NUM_NEW_TOKENS, limits.max_model_len - 1)
    prompts, continuations, start = [], [], 0
    for wanted in TEXT_PROMPT_LENGTHS:
        middle = start + min(wanted, limits.max_model_len - new_tokens)
        end = middle + new_tokens
        if end > len(token_ids):
            break
        prompts.append(token_ids[start:middle])
        continuations.append(token_ids[middle:end])
        start = end
    if not prompts:
        raise BuildError(f"{text} has {len(token_ids)} tokens; the numerics gate needs some hundreds")
    return Workload(
        prompts,
        num_new_tokens=new_tokens,
        block_size=block_size,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        chunk=TEXT_CHUNK,
        continuations=continuations,
        max_logits_rows=max_logits_rows,
    )


def read_tokens(text: Path, tokenizer_directory: Path) -> list[int]:
    """A text file's tokens by a checkpoint's tokenizer.

    Raises:
        BuildError: the file cannot be read.
        CheckpointError: the tokenizer cannot.
    """
    try:
        content = text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(f"cannot read {text}: {error}") from None
    return Tokenizer.from_directory(tokenizer_directory).encode(content)


def thresholds(precision: Precision, kv_cache_dtype: KvCacheDtype) -> Thresholds:
    """What engines of this precision over such a pool may come to."""
    limits = THRESHOLDS[precision]
    return limits.or_looser(FP8_KV_THRESHOLDS) if kv_cache_dtype == "fp8" else limits


def compare(reference: Executor, engine: Executor, workload: Workload, limits: Thresholds) -> GateReport:
    """Run the workload on both; the reference's tokens (or the text's) are what both go on with."""
    positions = agreeing = scored = 0
    logit_error = probability_error = 0.0
    divergence = scored_error = expected_loss = actual_loss = 0.0
    while (inputs := workload.next_step()) is not None:
        expected, actual = _logits(reference, inputs), _logits(engine, inputs)
        log_p, log_q = _log_softmax(expected), _log_softmax(actual)
        p, q = np.exp(log_p), np.exp(log_q)
        logit_error = _largest(expected - actual, logit_error)
        probability_error = _largest(p - q, probability_error)
        divergence += float((p * (log_p - log_q)).sum(dtype=np.float64))
        agreeing += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        positions += len(expected)
        following = workload.advance(expected)
        rows = np.flatnonzero(following >= 0)
        at = (rows, following[rows])
        scored += len(rows)
        scored_error += float(np.abs(p[at] - q[at]).sum(dtype=np.float64))
        expected_loss -= float(log_p[at].sum(dtype=np.float64))
        actual_loss -= float(log_q[at].sum(dtype=np.float64))
    report = GateReport(
        positions=positions,
        on_text=workload.is_text,
        scored_tokens=scored,
        max_abs_logit_error=logit_error,
        max_abs_probability_error=probability_error,
        mean_abs_probability_error=scored_error / scored,
        mean_kl_divergence=divergence / positions,
        top1_agreement=agreeing / positions,
        perplexity_ratio=math.exp(min((actual_loss - expected_loss) / scored, 700.0)),
    )
    return msgspec.structs.replace(report, exceeded=exceeded(report, limits))


def exceeded(report: GateReport, limits: Thresholds) -> tuple[str, ...]:
    """Names of the measures that do not keep to their threshold, NaN among them.

    What a model makes of random tokens is not what it is used for, and there it is unsure of everything: so
    the measures of the next token count on a text only. They must be numbers in any case.
    """
    mean, ratio = report.mean_abs_probability_error, report.perplexity_ratio
    kept = {
        "max_abs_logit_error": report.max_abs_logit_error <= limits.max_abs_logit_error,
        "max_abs_probability_error": report.max_abs_probability_error <= limits.max_abs_probability_error,
        "mean_abs_probability_error": (
            mean <= limits.mean_abs_probability_error if report.on_text else math.isfinite(mean)
        ),
        "mean_kl_divergence": report.mean_kl_divergence <= limits.mean_kl_divergence,
        "top1_agreement": report.top1_agreement >= limits.top1_agreement,
        "perplexity_ratio": (
            1 / limits.perplexity_ratio <= ratio <= limits.perplexity_ratio
            if report.on_text
            else math.isfinite(ratio)
        ),
    }
    return tuple(name for name, holds in kept.items() if not holds)


def enforce(
    report: GateReport, precision: Precision, kv_cache_dtype: KvCacheDtype, force: bool = False
) -> None:
    """Refuse an engine that is beyond a threshold, or whose figures are not numbers.

    Args:
        report: what `compare` found with the `thresholds` of this precision and pool.
        precision: of the engine.
        kv_cache_dtype: of its pool.
        force: let it pass; its manifest then lists what it exceeds. What is not a number never passes.

    Raises:
        NumericsGateError: it is refused.
    """
    is_number = all(math.isfinite(getattr(report, name)) for name in report.exceeded)
    if report.exceeded and not (force and is_number):
        limits = thresholds(precision, kv_cache_dtype)
        kind = precision + (" with KV in fp8" if kv_cache_dtype == "fp8" else "")
        beyond = ", ".join(
            f"{name} {getattr(report, name):.3g} (threshold {getattr(limits, name):g})"
            for name in report.exceeded
        )
        raise NumericsGateError(
            f"the engine differs from the torch module by more than {kind} allows: {beyond}; "
            f"nothing was published. Measured: {describe(report)}"
        )


def describe(report: GateReport) -> str:
    """The figures in one line."""
    return (
        f"max |delta logit| {report.max_abs_logit_error:.2e}, "
        f"|delta probability| max {report.max_abs_probability_error:.2e}, "
        f"mean {report.mean_abs_probability_error:.2e} over {report.scored_tokens} next tokens, "
        f"KL {report.mean_kl_divergence:.2e}, top-1 agreement {report.top1_agreement:.2%} "
        f"over {report.positions} positions, perplexity ratio {report.perplexity_ratio:.5f}"
    )


def _logits(executor: Executor, inputs: ModelInputs) -> NDArray[np.float32]:
    logits = executor.submit(inputs).result(STEP_TIMEOUT_S).logits
    assert logits is not None, "an engine under test returns logits"
    return logits


def _largest(difference: NDArray[np.float32], so_far: float) -> float:
    """The larger absolute value; NaN, once met, stays."""
    return float(np.maximum(so_far, np.abs(difference).max()))


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return log_probabilities
