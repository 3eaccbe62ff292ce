"""Which block is handed out next decides every block id, so the order is a promise."""

from __future__ import annotations

from collections import Counter

import pytest

from quire.scheduling.block_pool import Block, BlockPool


def ids(blocks: list[Block]) -> list[int]:
    return [block.block_id for block in blocks]


def test_fresh_pool_hands_out_every_block_but_the_null_block_in_order() -> None:
    pool = BlockPool(5)
    assert ids(pool.take(pool.num_free_blocks)) == [1, 2, 3, 4]


def test_unhashed_blocks_are_used_again_first_and_hashed_ones_last() -> None:
    pool = BlockPool(7)
    table = pool.take(4)
    pool.cache(table[0], b"a")
    pool.cache(table[1], b"b")
    pool.release(reversed(table))
    assert ids(pool.take(6)) == [4, 3, 5, 6, 2, 1]


def test_shared_block_leaves_the_free_list_and_comes_back_with_its_last_owner() -> None:
    pool = BlockPool(3)
    table = pool.take(1)
    pool.cache(table[0], b"a")
    pool.release(table)
    pool.share(table)
    pool.share(table)
    pool.release(table)
    assert pool.num_free_blocks == 1
    pool.check_integrity(Counter({1: 1}))
    pool.release(table)
    assert ids(pool.take(2)) == [2, 1]


def test_taken_block_is_not_found_any_more() -> None:
    pool = BlockPool(2)
    table = pool.take(1)
    pool.cache(table[0], b"a")
    pool.release(table)
    assert ids(pool.find_longest_prefix([b"a"])) == [1]
    pool.take(1)
    assert pool.find_longest_prefix([b"a"]) == []


def test_prefix_ends_at_the_first_block_that_is_not_cached() -> None:
    pool = BlockPool(4)
    table = pool.take(3)
    for block, name in zip(table, (b"a", b"b", b"c"), strict=True):
        pool.cache(block, name)
    pool.forget(table[1])
    assert ids(pool.find_longest_prefix([b"a", b"b", b"c"])) == [1]


def test_block_computed_twice_stays_found_until_both_copies_are_gone() -> None:
    pool = BlockPool(4)
    table = pool.take(3)
    for block in table:
        pool.cache(block, b"a")
    found = []
    for _ in table:
        found += pool.find_longest_prefix([b"a"])
        pool.forget(found[-1])
        pool.check_integrity(Counter([1, 2, 3]))
    assert ids(found) == [1, 2, 3]
    assert pool.find_longest_prefix([b"a"]) == []


@pytest.mark.parametrize("damage", ["owner", "free list", "hash", "count"])
def test_integrity_check_notices(damage: str) -> None:
    pool = BlockPool(5)
    table = pool.take(2)
    pool.cache(table[0], b"a")
    owners = Counter(ids(table))
    pool.check_integrity(owners)
    match damage:
        case "owner":
            table[1].ref_count += 1
        case "free list":
            pool.blocks[3].next_free = pool.blocks[0]
        case "hash":
            table[1].block_hash = b"b"
        case "count":
            pool.num_free_blocks -= 1
    with pytest.raises(AssertionError):
        pool.check_integrity(owners)
