"""Which contexts of a step are split, so that none keeps the others waiting: once for all layers."""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

SPARES_RADIX = tl.constexpr(256)
"""More than any tile has splits: seq_spares holds place * SPARES_RADIX + count."""


@triton.jit(do_not_specialize=["num_seqs"])
def assign_splits(
    query_start_loc,
    seq_lens,
    num_seqs,
    spare_tiles,
    seq_spares,
    TOKENS_PER_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    MOST: tl.constexpr,
    WHOLE: tl.constexpr,
    ROW_MIN_SPLIT: tl.constexpr,
    TILE_MIN_SPLIT: tl.constexpr,
    LONG_SPLIT: tl.constexpr,
    NUM_SPARE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Give each tile of a long context its share of the splits, by how many keys it has to read at most.

    A sequence whose splits find no room is not split, nor are those behind it. Grid: (1,).

    Args:
        query_start_loc: int32 [num_seqs + 1].
        seq_lens: int32 [num_seqs].
        spare_tiles: out, int32 [NUM_SPARE], whose splits beyond the first come here: of each tile as many as
            it has, in order, and -1 behind them.
        seq_spares: out, int32 [num_seqs], 0 for a sequence that is not split, else how many such splits each
            of its tiles has, plus SPARES_RADIX times where those of the first are among `spare_tiles`.
        TOKENS_PER_TILE: tokens of one query tile, see `paged_attention`.
        WINDOW: a query sees this many positions up to its own; 0 for all.
        MOST: splits of one tile of one token.
        WHOLE: keys up to which a context is not split.
        ROW_MIN_SPLIT: keys, the fewest worth a split of a tile of one token; TILE_MIN_SPLIT: of several.
        LONG_SPLIT: keys that a split of a tile of one token has at most, as long as there are places and
            MOST allows.
        NUM_SPARE: places.
        BLOCK_S: sequences looked at together.
    """
    all_keys = tl.zeros([BLOCK_S], tl.int64)
    long_keys = tl.zeros([BLOCK_S], tl.int64)
    for first_seq in range(0, num_seqs, BLOCK_S):
        _, is_row, tiles, keys = _contexts(
            query_start_loc, seq_lens, first_seq, num_seqs, TOKENS_PER_TILE, WINDOW, BLOCK_S
        )
        all_keys += tiles * keys
        long_keys += tl.where(is_row & (keys > LONG_SPLIT), keys, 0)
    # Of each of these there are at most NUM_SPARE shares, but there may be more of all together.
    fair = tl.cdiv(tl.sum(all_keys), NUM_SPARE)
    row_share, tile_share = tl.maximum(fair, ROW_MIN_SPLIT), tl.maximum(fair, TILE_MIN_SPLIT)
    long_share = tl.maximum(tl.cdiv(tl.sum(long_keys), NUM_SPARE), LONG_SPLIT)

    spare = tl.arange(0, NUM_SPARE)
    tile = tl.full([NUM_SPARE], -1, tl.int32)
    assigned = 0
    for first_seq in range(0, num_seqs, BLOCK_S):
        first_tile, is_row, tiles, keys = _contexts(
            query_start_loc, seq_lens, first_seq, num_seqs, TOKENS_PER_TILE, WINDOW, BLOCK_S
        )
        row_splits = tl.minimum(tl.maximum(keys // row_share, tl.cdiv(keys, long_share)), MOST)
        splits = tl.where(is_row, row_splits, keys // tile_share)
        spares = tl.where(keys > WHOLE, tl.maximum(splits - 1, 0), 0).to(tl.int32)  # of each tile
        end = assigned + tl.cumsum(spares * tiles, 0)
        start = end - spares * tiles
        spares = tl.where(end <= NUM_SPARE, spares, 0)  # no room for these
        theirs = (spare[:, None] >= start[None, :]) & (spare[:, None] < (start + spares * tiles)[None, :])
        their_tile = first_tile[None, :] + (spare[:, None] - start[None, :]) // tl.maximum(spares, 1)[None, :]
        tile = tl.maximum(tile, tl.max(tl.where(theirs, their_tile, -1), 1))
        seq = first_seq + tl.arange(0, BLOCK_S)
        packed = tl.where(spares > 0, start * SPARES_RADIX + spares, 0)
        tl.store(seq_spares + seq, packed, mask=seq < num_seqs)
        assigned = tl.max(end)
    tl.store(spare_tiles + spare, tile)


@triton.jit
def _contexts(
    query_start_loc,
    seq_lens,
    first_seq,
    num_seqs,
    TOKENS_PER_TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Of BLOCK_S sequences: first tile, whether it has one token, number of tiles, and the keys of each."""
    seq = first_seq + tl.arange(0, BLOCK_S)
    mask = seq < num_seqs
    query_start = tl.load(query_start_loc + seq, mask=mask, other=0)
    query_end = tl.load(query_start_loc + seq + 1, mask=mask, other=0)
    keys = tl.maximum(tl.load(seq_lens + seq, mask=mask, other=0), 0)
    query_len = tl.maximum(query_end - query_start, 0)
    first_tile = seq + (query_start - seq) // TOKENS_PER_TILE
    if WINDOW > 0:
        keys = tl.minimum(keys, WINDOW + TOKENS_PER_TILE)
    return first_tile, query_len == 1, tl.cdiv(query_len, TOKENS_PER_TILE), keys.to(tl.int64)
