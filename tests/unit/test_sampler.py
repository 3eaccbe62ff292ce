from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quire.errors import EngineStepError
from quire.execution.philox import philox4x32, uniforms
from quire.execution.sampler import ELEMENTS_AT_ONCE, Sampler, SamplingBatch

# counter, key, result: Random123's known answers for philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def batch(
    num_rows: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    first_seed: int = 0,
) -> SamplingBatch:
    """Rows that differ in their seed only."""
    return SamplingBatch(
        inverse_temperature=np.full(num_rows, 1 / temperature if temperature else 0, np.float32),
        top_k=np.full(num_rows, top_k),
        top_p=np.full(num_rows, top_p, np.float32),
        min_p=np.full(num_rows, min_p, np.float32),
        seed=np.arange(first_seed, first_seed + num_rows, dtype=np.uint64),
        output_index=np.zeros(num_rows, np.int64),
    )


def mixed_batch(num_rows: int, rng: np.random.Generator) -> SamplingBatch:
    """Every combination of parameters, greedy rows among them."""
    return SamplingBatch(
        inverse_temperature=rng.choice([0, 0.5, 1, 1.5], num_rows).astype(np.float32),
        top_k=rng.choice([0, 1, 3, 50, 10**6], num_rows),
        top_p=rng.choice([0.1, 0.5, 0.9, 1.0], num_rows).astype(np.float32),
        min_p=rng.choice([0.0, 0.02, 0.3], num_rows).astype(np.float32),
        seed=rng.integers(0, 2**64 - 1, num_rows, dtype=np.uint64),
        output_index=rng.integers(0, 5000, num_rows),
    )


def peaked_logits(num_rows: int, vocab_size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A few likely tokens and a long tail; coarse, so that ties are common."""
    logits = rng.standard_normal((num_rows, vocab_size)) * 2
    logits[:, : vocab_size // 20] += rng.uniform(0, 6, (num_rows, vocab_size // 20))
    coarse: NDArray[np.float32] = (np.round(logits * 8) / 8).astype(np.float32)
    return coarse


def reference_intervals(
    logits: NDArray[np.float32], parameters: SamplingBatch, row: int
) -> dict[int, tuple[float, float]]:
    """By token id, the interval of the uniform number that draws it; one row, float64, no shortcuts."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    tempered = logits[order].astype(np.float64) * float(parameters.inverse_temperature[row])
    probabilities = np.exp(tempered - tempered[0])
    kept = probabilities[probabilities >= parameters.min_p[row] * probabilities[0]]
    if parameters.top_k[row]:
        kept = kept[: parameters.top_k[row]]
    kept = kept / kept.sum()
    before = np.concatenate([[0.0], np.cumsum(kept)[:-1]])
    kept = kept[(before < parameters.top_p[row]) | (parameters.top_p[row] == 1)]
    bounds = np.concatenate([[0.0], np.cumsum(kept / kept.sum())])
    return {order[rank]: (bounds[rank], bounds[rank + 1]) for rank in range(len(kept))}


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    columns = [np.array(words, np.uint64)[:, None] for words in (counter, key)]
    assert philox4x32(*columns)[:, 0].tolist() == expected


def test_uniform_numbers_depend_on_every_bit_of_the_seed_and_on_the_output_index() -> None:
    seeds = np.array([7, 8, 7 + 2**32, 7 + 2**63, 7], np.uint64)
    numbers = uniforms(seeds, np.array([0, 0, 0, 0, 1]))
    assert len(set(numbers.tolist())) == 5


def test_uniform_numbers_fill_the_unit_interval_evenly_and_never_reach_one() -> None:
    numbers = uniforms(np.full(100_000, 3, np.uint64), np.arange(100_000))
    assert numbers.dtype == np.float32
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert abs(counts - 5000).max() < 5 * np.sqrt(5000)


def test_greedy_takes_the_best_token_and_among_equals_the_smaller_id() -> None:
    logits = np.array([[1, 5, 2, 5], [0, -1, 0, -3]], np.float32)
    assert Sampler().sample(logits, batch(2, temperature=0)).tolist() == [1, 0]


def test_drawn_tokens_agree_with_a_plain_reference_for_every_combination_of_parameters() -> None:
    rng = np.random.default_rng(1)
    logits, parameters = peaked_logits(400, 300, rng), mixed_batch(400, rng)
    token_ids = Sampler().sample(logits, parameters)
    numbers = uniforms(parameters.seed, parameters.output_index)
    for row, token_id in enumerate(token_ids.tolist()):
        if parameters.inverse_temperature[row] == 0:
            assert token_id == logits[row].argmax()
            continue
        low, high = reference_intervals(logits[row], parameters, row)[token_id]
        assert low - 1e-5 <= numbers[row] <= high + 1e-5


def test_drawn_tokens_have_the_distribution_of_the_logits() -> None:
    probabilities = np.array([0.5, 0.05, 0.3, 0.15])
    logits = np.tile(np.log(probabilities).astype(np.float32), (20_000, 1))
    counts = np.bincount(Sampler().sample(logits, batch(20_000)), minlength=4)
    deviation = np.sqrt(20_000 * probabilities * (1 - probabilities))
    assert (abs(counts - 20_000 * probabilities) < 5 * deviation).all()


def test_a_row_gives_the_same_token_alone_and_in_any_batch() -> None:
    rng = np.random.default_rng(2)
    vocab_size, num_rows = 5000, 120
    assert num_rows * vocab_size > 2 * ELEMENTS_AT_ONCE
    logits, parameters = peaked_logits(num_rows, vocab_size, rng), mixed_batch(num_rows, rng)
    together = Sampler().sample(logits, parameters).tolist()
    alone = [
        int(Sampler().sample(logits[[row]], parameters.rows(np.array([row])))[0]) for row in range(num_rows)
    ]
    shuffled = rng.permutation(num_rows)
    reordered = Sampler().sample(logits[shuffled], parameters.rows(shuffled)).tolist()
    assert alone == together
    assert reordered == [together[row] for row in shuffled]


def test_a_flat_distribution_reaches_every_token() -> None:
    logits = np.zeros((4000, 50), np.float32)
    assert set(Sampler().sample(logits, batch(4000)).tolist()) == set(range(50))


def test_equally_likely_tokens_are_drawn_in_order_of_their_ids() -> None:
    logits = np.full((1000, 4), -10, np.float32)
    logits[:, [1, 3]] = 10
    parameters = batch(1000)
    drawn = Sampler().sample(logits, parameters)
    numbers = uniforms(parameters.seed, parameters.output_index)
    assert drawn.tolist() == np.where(numbers < 0.5, 1, 3).tolist()


@pytest.mark.parametrize(
    "restriction", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-9}]
)
def test_restrictions_to_one_token_leave_the_best_one(restriction: dict[str, Any]) -> None:
    logits = peaked_logits(200, 500, np.random.default_rng(3)) + np.linspace(0, 0.1, 500, dtype=np.float32)
    assert Sampler().sample(logits, batch(200, **restriction)).tolist() == logits.argmax(axis=1).tolist()


def test_top_k_keeps_exactly_k_of_tied_tokens() -> None:
    drawn = Sampler().sample(np.zeros((2000, 30), np.float32), batch(2000, top_k=3))
    assert set(drawn.tolist()) == {0, 1, 2}


def test_min_p_applies_before_top_p() -> None:
    # min_p leaves 0.4 and 0.3; renormalised, the first of them alone has more than half.
    logits = np.tile(np.log(np.array([0.4, 0.3, 0.1, 0.1, 0.1])).astype(np.float32), (500, 1))
    assert set(Sampler().sample(logits, batch(500, min_p=0.5, top_p=0.55)).tolist()) == {0}
    assert set(Sampler().sample(logits, batch(500, top_p=0.55)).tolist()) == {0, 1}


def test_tokens_of_minus_infinity_are_never_drawn() -> None:
    logits = np.zeros((1000, 6), np.float32)
    logits[:, ::2] = -np.inf
    assert set(Sampler().sample(logits, batch(1000, temperature=5)).tolist()) == {1, 3, 5}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [[0, np.nan, 1], [0, np.inf, 1], [-np.inf] * 3])
def test_logits_that_are_not_numbers_are_an_error(temperature: float, broken: list[float]) -> None:
    logits = np.array([[1, 2, 3], broken], np.float32)
    with pytest.raises(EngineStepError, match="row 1"):
        Sampler().sample(logits, batch(2, temperature=temperature))


def test_a_step_without_rows_samples_nothing() -> None:
    assert Sampler().sample(np.zeros((0, 100), np.float32), batch(0)).tolist() == []


def test_packed_parameters_say_all_that_a_token_depends_on() -> None:
    rng = np.random.default_rng(7)
    logits, parameters = peaked_logits(200, 300, rng), mixed_batch(200, rng)
    tensor = np.full((200, 5), np.nan, np.float32)
    parameters.pack(tensor)
    drawn = parameters.inverse_temperature > 0
    numbers = uniforms(parameters.seed, parameters.output_index)
    assert tensor[:, 4].tolist() == np.where(drawn, numbers, 0).tolist()
    packed = Sampler().sample_packed(logits, tensor).tolist()
    assert packed == Sampler().sample(logits, parameters).tolist()
    tensor[drawn, 4] = 0
    smallest = Sampler().sample_packed(logits, tensor)
    assert smallest.tolist() == logits.argmax(axis=1).tolist()
