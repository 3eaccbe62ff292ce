"""The attention operator's specification."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from quire_build.paged_attention import paged_attention, paged_attention_in_place

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4, 2, 8, 4


def _ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _tokens(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    query = torch.randn(count, HEADS * HEAD_DIM, generator=generator)
    key, value = torch.randn(2, count, KV_HEADS * HEAD_DIM, generator=generator)
    return query, key, value


def _dense(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The last token's attention over all keys, by the textbook; [HEADS * HEAD_DIM]."""
    heads = query[-1].view(HEADS, HEAD_DIM)
    groups = HEADS // KV_HEADS
    all_keys = keys.view(-1, KV_HEADS, HEAD_DIM).repeat_interleave(groups, 1)
    all_values = values.view(-1, KV_HEADS, HEAD_DIM).repeat_interleave(groups, 1)
    weights = F.softmax(torch.einsum("hd,thd->ht", heads, all_keys) * 0.3, dim=-1)
    return torch.einsum("ht,thd->hd", weights, all_values).flatten()


def _pool() -> tuple[torch.Tensor, torch.Tensor]:
    shape = (6, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    return torch.full(shape, 1e3), torch.full(shape, 1e3)


def test_a_sequence_reads_a_shared_block_that_a_later_one_writes_in_the_same_step() -> None:
    query, key, value = _tokens(5)
    # Row 0 is the fifth token of a sequence whose first block the second sequence computes right now.
    key_cache, value_cache = _pool()
    output, _, _ = paged_attention_in_place(
        query,
        key,
        value,
        key_cache,
        value_cache,
        _ints(2 * BLOCK_SIZE, *range(3 * BLOCK_SIZE, 4 * BLOCK_SIZE)),
        torch.stack((_ints(3, 2), _ints(3, 0))),
        _ints(0, 1, 5),
        _ints(5, 4),
        0.3,
        HEADS,
        KV_HEADS,
        0,
    )
    keys, values = torch.cat((key[1:], key[:1])), torch.cat((value[1:], value[:1]))
    torch.testing.assert_close(output[0], _dense(query[:1], keys, values))
    torch.testing.assert_close(output[4], _dense(query, key[1:], value[1:]))


def test_a_window_of_n_sees_n_positions_its_own_included() -> None:
    query, key, value = _tokens(6)
    output, _, _ = paged_attention_in_place(
        query,
        key,
        value,
        *_pool(),
        _ints(8, 9, 10, 11, 4, 5),
        torch.stack((_ints(2, 1),)),
        _ints(0, 6),
        _ints(6),
        0.3,
        HEADS,
        KV_HEADS,
        3,
    )
    torch.testing.assert_close(output[5], _dense(query, key[3:], value[3:]))
    torch.testing.assert_close(output[1], _dense(query[:2], key[:2], value[:2]))


def test_the_traced_form_is_the_in_place_form_on_copies() -> None:
    query, key, value = _tokens(3)
    key_cache, value_cache = _pool()
    rest = (_ints(5, 6, 7), torch.stack((_ints(1),)), _ints(0, 3), _ints(4), 0.3, HEADS, KV_HEADS, 0)
    output, new_keys, new_values = paged_attention(query, key, value, key_cache, value_cache, *rest)
    assert torch.equal(key_cache, _pool()[0]) and torch.equal(value_cache, _pool()[1])
    expected = paged_attention_in_place(query, key, value, key_cache, value_cache, *rest)
    assert torch.equal(output, expected[0])
    assert torch.equal(new_keys, key_cache) and torch.equal(new_values, value_cache)
