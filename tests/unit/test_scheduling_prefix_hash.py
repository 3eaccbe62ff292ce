"""Blocks are shared exactly between requests that agree on salt and tokens up to the block's end."""

from __future__ import annotations

from quire.scheduling.prefix_hash import PrefixHasher


def hashes(token_ids: list[int], salt: str | None = None, block_size: int = 4) -> list[bytes]:
    return list(PrefixHasher(block_size, salt).hash_full_blocks(token_ids))


def test_only_full_blocks_are_hashed() -> None:
    assert [len(hashes(list(range(length)))) for length in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_hash_covers_every_token_before_the_end_of_its_block() -> None:
    original = list(range(12))
    for position in range(12):
        changed = original.copy()
        changed[position] += 1
        agree = [a == b for a, b in zip(hashes(original), hashes(changed), strict=True)]
        assert agree == [block < position // 4 for block in range(3)]


def test_salts_are_kept_apart() -> None:
    token_ids = list(range(8))
    variants = [hashes(token_ids, salt) for salt in (None, "", "a", "b", "ab")]
    assert len({block_hash for variant in variants for block_hash in variant}) == 2 * len(variants)


def test_tokens_added_one_by_one_hash_like_tokens_known_at_once() -> None:
    hasher = PrefixHasher(4, "salt")
    token_ids: list[int] = []
    for token_id in range(70000, 70021):
        token_ids.append(token_id)
        assert hasher.hash_full_blocks(token_ids) == hashes(token_ids, "salt")
