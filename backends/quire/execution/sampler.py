"""From logits to token ids, for a whole batch at once.

A token is drawn by inverting the cumulative distribution of the candidates, ordered by descending
probability and among equals by smaller id, at the one uniform number that `philox` gives for the request's
seed and output index. Filters apply in vLLM's order: temperature, min_p, top_k, top_p, each to the
probabilities as the one before left them, renormalised. A row's token depends on that row alone, bit for
bit: in whatever batch it stands, the same operations run on it in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quire.errors import EngineStepError
from quire.execution.model_inputs import NUM_SAMPLING_COLUMNS
from quire.execution.philox import uniforms

SMALLEST_TEMPERATURE = 1e-5
"""Temperatures between 0 and this one count as this one: its inverse is still a number."""

CUTS = (2.0**-8, 2.0**-16, 0.0)
"""Candidates are looked for among those with at least this weight, relative to the best one's; rows that
these do not decide go on to the next cut, and the last takes the whole vocabulary."""

ELEMENTS_AT_ONCE = 1 << 18
"""Logits worked on together, so that the intermediate arrays stay in the processor's cache."""


@dataclass(slots=True)
class SamplingBatch:
    """How the tokens of N rows of logits are chosen; every array is [N]."""

    inverse_temperature: NDArray[np.float32]
    """0 is greedy."""
    top_k: NDArray[np.int64]
    """0 keeps all."""
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    seed: NDArray[np.uint64]
    output_index: NDArray[np.int64]
    """Tokens that the request's output already has."""

    def rows(self, rows: NDArray[np.intp]) -> SamplingBatch:
        """The same for some of the rows."""
        return SamplingBatch(
            self.inverse_temperature[rows],
            self.top_k[rows],
            self.top_p[rows],
            self.min_p[rows],
            self.seed[rows],
            self.output_index[rows],
        )

    def pack(self, tensor: NDArray[np.float32]) -> None:
        """Write the engine contract's tensor [N, 5], float32 throughout; greedy rows get the number 0."""
        tensor[:, 0] = self.inverse_temperature
        tensor[:, 1] = self.top_k
        tensor[:, 2] = self.top_p
        tensor[:, 3] = self.min_p
        tensor[:, 4] = 0
        drawn = np.flatnonzero(self.inverse_temperature)
        if len(drawn):
            tensor[drawn, 4] = uniforms(self.seed[drawn], self.output_index[drawn])


class Sampler:
    """Chooses the next token of each row."""

    def sample(self, logits: NDArray[np.float32], sampling: SamplingBatch) -> NDArray[np.int32]:
        """Choose one token per row; as `sample_packed`, with the rows' parameters not packed yet."""
        tensor = np.empty((len(logits), NUM_SAMPLING_COLUMNS), dtype=np.float32)
        sampling.pack(tensor)
        return self.sample_packed(logits, tensor)

    def sample_packed(self, logits: NDArray[np.float32], sampling: NDArray[np.float32]) -> NDArray[np.int32]:
        """Choose one token per row.

        Args:
            logits: [N, vocab_size]; minus infinity excludes a token.
            sampling: [N, 5], the engine contract's tensor.

        Returns:
            [N] token ids.

        Raises:
            EngineStepError: a row holds NaN or plus infinity, or nothing but minus infinity.
        """
        token_ids = logits.argmax(axis=1)
        best = np.take_along_axis(logits, token_ids[:, None], axis=1)
        if not np.isfinite(best).all():  # argmax stops at a NaN, so a row's best logit shows it
            row = int(np.flatnonzero(~np.isfinite(best))[0])
            raise EngineStepError(
                f"the best logit of row {row} is {best[row, 0]}; it must be a finite number"
            )
        drawn = np.flatnonzero(sampling[:, 0])
        rows_at_once = max(1, ELEMENTS_AT_ONCE // logits.shape[1])
        for start in range(0, len(drawn), rows_at_once):
            rows = drawn[start : start + rows_at_once]
            weights = (logits[rows] - best[rows]) * sampling[rows, :1]
            np.exp(weights, out=weights)
            token_ids[rows] = _draw(weights, sampling[rows])
        chosen_ids: NDArray[np.int32] = token_ids.astype(np.int32)
        return chosen_ids


def _draw(weights: NDArray[np.float32], sampling: NDArray[np.float32]) -> NDArray[np.int64]:
    """Draw one id per row from unnormalised probabilities [N, vocab_size] whose best is 1."""
    totals = weights.astype(np.float64).sum(axis=1)
    drawn = np.empty(len(weights), dtype=np.int64)
    undecided = np.arange(len(weights))
    for cut in CUTS:
        ids, decided = _draw_above(cut, weights[undecided], totals[undecided], sampling[undecided])
        drawn[undecided[decided]] = ids[decided]
        undecided = undecided[~decided]
        if not len(undecided):
            break
    return drawn


def _draw_above(
    cut: float,
    weights: NDArray[np.float32],
    totals: NDArray[np.float64],
    sampling: NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Draw among the candidates of weight `cut` and more.

    They are the first ones of the descending order, so whatever they decide, all candidates would decide
    the same way.

    Returns:
        [N] ids and [N] whether the row is decided; the ids of other rows mean nothing.
    """
    _, top_k, top_p, min_p, point = sampling.T
    ids, ordered, num_known = _descending(weights, cut)
    cumulative = np.cumsum(ordered, axis=1, dtype=np.float64)
    known_mass = cumulative[:, -1]
    vocab_size = weights.shape[1]

    most = np.where(top_k > 0, np.minimum(top_k, vocab_size), vocab_size).astype(np.int64)
    by_min_p = min_p > 0
    num_likely = np.where(by_min_p, (ordered >= min_p[:, None]).sum(axis=1), num_known)
    num_kept = np.minimum(num_likely, most)
    restricted = by_min_p | (most < vocab_size)
    kept_known = (most <= num_known) | (by_min_p & (min_p >= cut)) | (num_known == vocab_size)
    mass = np.where(restricted, _mass_of_first(num_kept, cumulative), totals)

    by_top_p = top_p < 1
    nucleus_mass = top_p * mass
    num_nucleus = np.minimum(1 + (cumulative < nucleus_mass[:, None]).sum(axis=1), num_kept)
    nucleus_known = ~by_top_p | kept_known | (known_mass >= nucleus_mass)
    num_kept = np.where(by_top_p, num_nucleus, num_kept)
    mass = np.where(by_top_p, _mass_of_first(num_kept, cumulative), mass)

    target = point * mass
    index = (cumulative <= target[:, None]).sum(axis=1)
    decided = (kept_known | ~restricted) & nucleus_known & ((target < known_mass) | kept_known)
    index = np.minimum(index, num_kept - 1)
    return np.take_along_axis(ids, index[:, None], axis=1)[:, 0], decided


def _descending(
    weights: NDArray[np.float32], cut: float
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Candidates of at least a weight, by descending weight and then by ascending id.

    Returns:
        [N, K] ids, [N, K] weights, padded with weight 0 to the longest row, and [N] candidates per row.
    """
    num_rows, vocab_size = weights.shape
    found = np.flatnonzero(weights >= cut)
    if len(found) > weights.size // 4:  # sorting all is quicker than picking so many out
        counts = np.full(num_rows, vocab_size)
        keys = _descending_keys(weights, np.arange(vocab_size))
    else:
        rows, ids = np.divmod(found, vocab_size)
        counts = np.bincount(rows, minlength=num_rows)
        columns = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
        keys = np.full((num_rows, counts.max()), np.iinfo(np.uint64).max)
        keys[rows, columns] = _descending_keys(weights[rows, ids], ids)
    keys.sort(axis=1)
    ordered = (~keys >> np.uint64(32)).astype(np.uint32).view(np.float32)
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64), ordered, counts


def _descending_keys(weights: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Integers whose ascending order is that of descending weight, among equals of ascending id.

    The bits of a float32 that is not negative are ordered as its value is; their complement goes above the
    id. The largest integer of all stands for weight 0.
    """
    descending = (~weights.view(np.uint32)).astype(np.uint64)
    keys: NDArray[np.uint64] = (descending << np.uint64(32)) | ids.astype(np.uint64)
    return keys


def _mass_of_first(count: NDArray[np.int64], cumulative: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weight [N] of each row's first `count` candidates."""
    last = np.clip(count - 1, 0, cumulative.shape[1] - 1)
    return np.take_along_axis(cumulative, last[:, None], axis=1)[:, 0]
