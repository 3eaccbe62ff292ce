"""Incremental detokenisation: no character split, nothing lost, nothing said twice."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quire.text.detokenizer import MAX_HELD_TOKENS, IncrementalDetokenizer
from quire.text.tokenizer import Tokenizer

TEXT = "naïve 😀 the 日本語 and café 👩‍👩‍👧 e\u0301."

TOKENIZERS = ["byte_level_tokenizer", "byte_fallback_tokenizer"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    fixture: Tokenizer = request.getfixturevalue(request.param)
    return fixture


def deltas(tokenizer: Tokenizer, prompt_ids: list[int], output_ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_ids)
    return [*map(detokenizer.push, output_ids), detokenizer.flush()]


def test_deltas_continue_the_prompt_at_every_split_between_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    whole = tokenizer.decode(ids)
    splits = 0
    for split in range(1, len(ids)):
        prompt_text = tokenizer.decode(ids[:split])
        if prompt_text.endswith("\ufffd"):
            continue
        splits += 1
        assert prompt_text + "".join(deltas(tokenizer, ids[:split], ids[split:])) == whole
    assert splits > 10


def test_no_delta_holds_part_of_a_character(tokenizer: Tokenizer) -> None:
    pieces = deltas(tokenizer, tokenizer.encode("the "), tokenizer.encode(TEXT))
    assert not any("\ufffd" in piece for piece in pieces)


def test_each_character_comes_with_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)[1:]
    detokenizer = IncrementalDetokenizer(tokenizer, [])
    so_far = ""
    for end, token_id in enumerate(ids, start=1):
        so_far += detokenizer.push(token_id)
        decoded = tokenizer.decode(ids[:end])
        if not decoded.endswith("\ufffd"):
            assert so_far == decoded


def test_an_unfinished_character_is_flushed_as_a_replacement(byte_level_tokenizer: Tokenizer) -> None:
    ids = byte_level_tokenizer.encode("the 🂡")[1:]
    assert "".join(deltas(byte_level_tokenizer, [0], ids[:-1])) == "the \ufffd"


def test_a_prompt_that_ends_within_a_character_is_not_repeated(byte_level_tokenizer: Tokenizer) -> None:
    prompt = byte_level_tokenizer.encode("the 🂡")[:-1]
    output = byte_level_tokenizer.encode("and")[1:]
    assert "".join(deltas(byte_level_tokenizer, prompt, output)).lstrip("\ufffd") == "and"


def test_special_tokens_have_no_text(byte_level_tokenizer: Tokenizer) -> None:
    ids = byte_level_tokenizer.encode("the fox")[1:]
    with_specials = [1, *ids[:1], 0, *ids[1:], 1]
    assert "".join(deltas(byte_level_tokenizer, [0], with_specials)) == "the fox"


def test_bytes_of_no_character_are_not_held_for_ever(byte_level_tokenizer: Tokenizer) -> None:
    start_of_character = byte_level_tokenizer.encode("🂡")[1]
    pieces = deltas(byte_level_tokenizer, [0], [start_of_character] * (3 * MAX_HELD_TOKENS))
    assert sum(piece != "" for piece in pieces[:-1]) >= 2


@given(ids=st.lists(st.integers(2, 257), max_size=60), prompt_length=st.integers(0, 10))
@example(ids=[2] * 40, prompt_length=3)
def test_any_byte_tokens_give_the_text_of_decoding_them_at_once(
    byte_level_tokenizer: Tokenizer, ids: list[int], prompt_length: int
) -> None:
    prompt = byte_level_tokenizer.encode("the fox is here")[:prompt_length]
    whole = byte_level_tokenizer.decode([*prompt, *ids])
    assert byte_level_tokenizer.decode(prompt) + "".join(deltas(byte_level_tokenizer, prompt, ids)) == whole
