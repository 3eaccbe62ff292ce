from __future__ import annotations

import numpy as np
import pytest

from quire.execution.model_inputs import ModelInputs
from quire.execution.padding import blank_step, pad_into, step_size

MAX_NUM_SEQS, WIDTH = 6, 5


def mixed_step(query_lens: list[int], num_rows: int, *, width: int = 3) -> ModelInputs:
    """Sequences of so many tokens, the last of which want logits; all numbers different from padding's."""
    starts = np.array([0, *np.cumsum(query_lens)], np.int32)
    count, num_seqs = np.arange(starts[-1], dtype=np.int32), len(query_lens)
    return ModelInputs(
        step=7,
        input_ids=count + 50,
        positions=count + 20,
        slot_mapping=count + 300,
        block_tables=np.arange(1, num_seqs * width + 1, dtype=np.int32).reshape(num_seqs, width),
        query_start_loc=starts,
        seq_lens=np.arange(num_seqs, dtype=np.int32) + 41,
        logits_indices=starts[1:][num_seqs - num_rows :] - 1,
        sampling=np.full((num_rows, 5), 0.5, np.float32),
    )


def pad_to(step: ModelInputs, size: int) -> ModelInputs:
    """The step in arrays that come full of garbage."""
    padded = blank_step(size, MAX_NUM_SEQS, WIDTH)
    assert padded.sampling is not None
    for array in (
        padded.input_ids, padded.positions, padded.slot_mapping, padded.block_tables, padded.query_start_loc,
        padded.seq_lens, padded.logits_indices, padded.sampling,
    ):  # fmt: skip
        array[:] = 99
    pad_into(step, padded)
    return padded


@pytest.mark.parametrize(
    ("tokens", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 20), (20, 20)]
)
def test_a_step_takes_the_smallest_size_that_holds_its_tokens(tokens: int, size: int) -> None:
    sizes = (1, 2, 4, 8, 20)
    assert step_size(sizes, mixed_step([1] * tokens, tokens)) == size
    assert step_size(sizes, mixed_step([tokens], 0)) == size


@pytest.mark.parametrize("size", [1, 4, 6, 7, 20])
def test_a_size_has_as_many_sequences_and_rows_as_there_can_be(size: int) -> None:
    blank, seqs = blank_step(size, MAX_NUM_SEQS, WIDTH), min(size, MAX_NUM_SEQS)
    assert blank.input_ids.shape == blank.positions.shape == blank.slot_mapping.shape == (size,)
    assert blank.block_tables.shape == (seqs, WIDTH) and not blank.block_tables.any()
    assert blank.query_start_loc.shape == (seqs + 1,)
    assert blank.seq_lens.shape == blank.logits_indices.shape == (seqs,)
    assert blank.sampling is not None and blank.sampling.shape == (seqs, 5)


@pytest.mark.parametrize("num_rows", [0, 1, 3])
@pytest.mark.parametrize(
    ("query_lens", "size"),
    [([1, 1, 1], 3), ([1, 1, 1], 4), ([1, 1, 1], 20), ([1, 5, 2], 8), ([1, 5, 2], 9), ([4, 1, 11], 20)],
    ids=["full", "decode", "decode far below", "full of chunks", "chunks", "chunks far below"],
)
def test_padding_is_tokens_of_nobody_sequences_without_tokens_and_greedy_rows(
    query_lens: list[int], size: int, num_rows: int
) -> None:
    step = mixed_step(query_lens, num_rows)
    padded = pad_to(step, size)
    tokens, seqs = sum(query_lens), min(size, MAX_NUM_SEQS)
    for name in ("input_ids", "positions", "slot_mapping"):
        assert getattr(padded, name).tolist() == [*getattr(step, name).tolist(), *[0] * (size - tokens)]
    assert padded.block_tables[:3, :3].tolist() == step.block_tables.tolist()
    assert padded.query_start_loc.tolist() == [*step.query_start_loc.tolist(), *[tokens] * (seqs - 3)]
    assert padded.seq_lens.tolist() == [41, 42, 43, *[0] * (seqs - 3)]
    assert padded.logits_indices.tolist() == [*step.logits_indices.tolist(), *[0] * (seqs - num_rows)]
    assert padded.sampling is not None
    assert padded.sampling.tolist() == [[0.5] * 5] * num_rows + [[0.0] * 5] * (seqs - num_rows)


def test_tables_that_nothing_reads_are_left_alone() -> None:
    padded = pad_to(mixed_step([1, 5, 2], 3), 20)
    assert (padded.block_tables[3:] == 99).all() and (padded.block_tables[:, 3:] == 99).all()


def test_a_step_without_sampling_parameters_is_greedy_when_padded() -> None:
    step = mixed_step([1, 1], 2)
    step.sampling = None
    padded = pad_to(step, 4)
    assert padded.logits_indices.tolist() == [0, 1, 0, 0]
    assert padded.sampling is not None and not padded.sampling.any()


def test_a_padded_step_shares_no_memory_with_the_step() -> None:
    step = mixed_step([1] * 4, 4)
    padded = pad_to(step, 4)
    step.input_ids[:] = -9
    assert padded.input_ids.tolist() == [50, 51, 52, 53]
