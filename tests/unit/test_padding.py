from __future__ import annotations

import numpy as np
import pytest

from quire.execution.model_inputs import ModelInputs
from quire.execution.padding import blank_step, decode_size, pad_into


def decode_step(num_seqs: int, num_rows: int, *, width: int = 3) -> ModelInputs:
    """Sequences of one token each, all numbers different from padding's."""
    count = np.arange(num_seqs, dtype=np.int32)
    return ModelInputs(
        step=7,
        input_ids=count + 50,
        positions=count + 20,
        slot_mapping=count + 300,
        block_tables=np.arange(1, num_seqs * width + 1, dtype=np.int32).reshape(num_seqs, width),
        query_start_loc=np.arange(num_seqs + 1, dtype=np.int32),
        seq_lens=count + 21,
        logits_indices=count[num_seqs - num_rows :],
        sampling=np.full((num_rows, 5), 0.5, np.float32),
    )


def pad_to(step: ModelInputs, num_seqs: int) -> ModelInputs:
    padded = blank_step(num_seqs, step.block_tables.shape[1])
    pad_into(step, padded)
    return padded


@pytest.mark.parametrize(("num_seqs", "size"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, None)])
def test_a_decode_step_takes_the_smallest_size_that_holds_it(num_seqs: int, size: int | None) -> None:
    assert decode_size((1, 2, 4, 8), decode_step(num_seqs, num_seqs)) == size


def test_a_step_with_a_sequence_of_more_than_one_token_has_no_size() -> None:
    step = decode_step(3, 3)
    step.seq_lens = step.seq_lens[:2]
    assert decode_size((1, 2, 4, 8), step) is None


@pytest.mark.parametrize("num_rows", [0, 1, 3])
def test_padding_is_sequences_of_one_token_in_the_null_block(num_rows: int) -> None:
    step = decode_step(3, num_rows)
    padded = pad_to(step, 5)
    for name in ("input_ids", "positions", "slot_mapping"):
        assert getattr(padded, name).tolist() == [*getattr(step, name).tolist(), 0, 0]
    assert padded.block_tables.tolist() == [*step.block_tables.tolist(), [0] * 3, [0] * 3]
    assert padded.query_start_loc.tolist() == [0, 1, 2, 3, 4, 5]
    assert padded.seq_lens.tolist() == [*step.seq_lens.tolist(), 1, 1]
    assert padded.logits_indices.tolist() == [*step.logits_indices.tolist(), *[0] * (5 - num_rows)]
    assert padded.sampling is not None
    assert padded.sampling.tolist() == [[0.5] * 5] * num_rows + [[0.0] * 5] * (5 - num_rows)


def test_a_step_without_sampling_parameters_is_greedy_when_padded() -> None:
    step = decode_step(2, 2)
    step.sampling = None
    padded = pad_to(step, 4)
    assert padded.sampling is not None and not padded.sampling.any()


def test_a_padded_step_shares_no_memory_with_the_step() -> None:
    step = decode_step(4, 4)
    padded = pad_to(step, 4)
    step.input_ids[:] = -9
    assert padded.input_ids.tolist() == [50, 51, 52, 53]
