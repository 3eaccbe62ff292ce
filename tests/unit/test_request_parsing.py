"""Requests: defaults filled in as documented, and each bad value refused by name, value and limit."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quire.errors import InvalidRequestError
from quire.serving.frontend.generation_defaults import GenerationDefaults
from quire.serving.frontend.request_parsing import (
    MAX_STOP_STRING_BYTES,
    MAX_STOP_STRINGS,
    MIN_TEMPERATURE,
    GenerationRequest,
    RequestParser,
)
from quire.text.tokenizer import Tokenizer

MAX_MODEL_LEN = 64
VOCAB_SIZE = 320
DEFAULTS = GenerationDefaults(max_tokens=16, temperature=0.6, top_k=40, top_p=0.9, eos_token_ids=(1, 5))


@pytest.fixture
def parser(byte_level_tokenizer: Tokenizer) -> RequestParser:
    return RequestParser(byte_level_tokenizer, DEFAULTS, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)


def strings(*values: bytes) -> NDArray[np.object_]:
    return np.array(values, dtype=np.object_)


def tensors(**fields: Any) -> dict[str, NDArray[Any]]:
    """A request's tensors as Triton hands them over; a prompt unless one is named."""
    types: dict[str, Any] = {"seed": np.uint64, "stream": np.bool_, "exclude_input_in_output": np.bool_}
    types |= dict.fromkeys(["temperature", "top_p", "min_p"], np.float32)
    if not fields.keys() & {"text_input", "input_ids"}:
        fields["text_input"] = strings(b"the fox")
    return {
        name: value
        if isinstance(value, np.ndarray)
        else np.atleast_1d(np.array(value, dtype=types.get(name, np.int32)))
        for name, value in fields.items()
    }


def test_what_a_request_leaves_out_comes_from_the_defaults(parser: RequestParser) -> None:
    request = parser.parse(tensors())
    params = request.sampling_params
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p, params.min_p) == (
        16,
        0.6,
        40,
        0.9,
        0.0,
    )
    assert params.stop_token_ids == (1, 5)
    assert not request.stream
    assert request.stop == ()


def test_what_a_request_brings_replaces_the_defaults(parser: RequestParser) -> None:
    request = parser.parse(
        tensors(max_tokens=3, temperature=0, top_k=7, top_p=0.5, min_p=0.25, seed=2**64 - 1, stream=True)
        | {"stop": strings(b"END", "é".encode())}
    )
    params = request.sampling_params
    assert (params.max_tokens, params.top_k, params.top_p, params.min_p) == (3, 7, 0.5, 0.25)
    assert params.greedy
    assert params.seed == 2**64 - 1
    assert request.stop == ("END", "é")
    assert request.stream


def test_a_request_without_a_seed_gets_one_of_its_own(parser: RequestParser) -> None:
    seeds = {parser.parse(tensors()).sampling_params.seed for _ in range(4)}
    assert len(seeds) == 4


@pytest.mark.parametrize(("given", "meant"), [(-1, 0), (0, 0), (1, 1)])
def test_top_k_of_0_and_minus_1_keep_all(parser: RequestParser, given: int, meant: int) -> None:
    assert parser.parse(tensors(top_k=given)).sampling_params.top_k == meant


def test_tiny_temperatures_are_raised_but_0_stays_greedy(parser: RequestParser) -> None:
    assert parser.parse(tensors(temperature=1e-30)).sampling_params.temperature == MIN_TEMPERATURE
    assert parser.parse(tensors(temperature=0)).sampling_params.temperature == 0


def test_text_is_tokenised_with_one_bos(parser: RequestParser, byte_level_tokenizer: Tokenizer) -> None:
    request = parser.parse(tensors(text_input=strings(b"<s>the fox")))
    assert request.prompt_token_ids == byte_level_tokenizer.encode("the fox")


def test_ids_are_taken_as_they_are(parser: RequestParser) -> None:
    request = parser.parse(tensors(input_ids=[7, 0, VOCAB_SIZE - 1]))
    assert request.prompt_token_ids == [7, 0, VOCAB_SIZE - 1]
    assert all(type(token_id) is int for token_id in request.prompt_token_ids)


@pytest.mark.parametrize(
    ("fields", "echoed"),
    [
        ({}, True),
        ({"stream": True}, False),
        ({"stream": True, "exclude_input_in_output": False}, True),
        ({"exclude_input_in_output": True}, False),
    ],
)
def test_the_prompt_is_echoed_unless_streaming_or_excluded(
    parser: RequestParser, byte_level_tokenizer: Tokenizer, fields: dict[str, bool], echoed: bool
) -> None:
    ids = byte_level_tokenizer.encode("the fox")
    expected = "the fox" if echoed else ""
    assert parser.parse(tensors(**fields)).echo == expected
    assert parser.parse(tensors(input_ids=ids, **fields)).echo == expected


def test_a_default_of_max_tokens_gives_way_to_the_prompt(parser: RequestParser) -> None:
    request = parser.parse(tensors(input_ids=[7] * (MAX_MODEL_LEN - 2)))
    assert request.sampling_params.max_tokens == 2


def test_the_whole_room_may_be_asked_for(parser: RequestParser) -> None:
    request = parser.parse(tensors(input_ids=[7] * 10, max_tokens=MAX_MODEL_LEN - 10))
    assert request.sampling_params.max_tokens == MAX_MODEL_LEN - 10


LONG = b"zq" * MAX_MODEL_LEN

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"text_input": strings(b"")}, "text_input is empty"),
    ({"text_input": strings(b"a\xffb")}, "text_input is not valid UTF-8: byte 1 is 0xff"),
    ({"text_input": strings("é".encode()[:1])}, "text_input is not valid UTF-8: byte 0 is 0xc3"),
    ({"text_input": strings(LONG)}, f"text_input has 129 tokens; at most {MAX_MODEL_LEN - 1} fit"),
    ({"text_input": strings(b"the " * 250_000)}, "text_input has 1000000 bytes; at most"),
    ({"text_input": strings(b"a", b"b")}, "text_input has the shape [2]; it must be [1]"),
    ({"text_input": np.array([1], np.int32)}, "text_input has the type int32; it must be STRING"),
    ({"text_input": strings(b"a"), "input_ids": [1]}, "text_input and input_ids are both given"),
    ({"input_ids": np.zeros(0, np.int32)}, "input_ids has no tokens"),
    ({"input_ids": [[1, 2]]}, "input_ids has the shape [1, 2]"),
    ({"input_ids": [1, VOCAB_SIZE]}, f"input_ids has token id {VOCAB_SIZE}; ids must be from 0 to"),
    ({"input_ids": [1, -1]}, "input_ids has token id -1"),
    ({"input_ids": [7] * MAX_MODEL_LEN}, f"input_ids has {MAX_MODEL_LEN} tokens; at most"),
    ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    ({"max_tokens": -5}, "max_tokens is -5"),
    ({"input_ids": [7] * 10, "max_tokens": MAX_MODEL_LEN - 9}, "max_tokens is 55; with a prompt of 10"),
    ({"max_tokens": np.array(3, np.int32)}, "max_tokens has the shape []; it must be [1]"),
    ({"max_tokens": np.array([3], np.int64)}, "max_tokens has the type int64; it must be INT32"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"top_p": 0}, "top_p is 0; it must be above 0 and at most 1"),
    ({"top_p": 2}, "top_p is 2"),
    ({"top_p": float("nan")}, "top_p is nan"),
    ({"top_k": -2}, "top_k is -2; it must be at least -1"),
    ({"min_p": -0.5}, "min_p is -0.5; it must be from 0 to 1"),
    ({"min_p": 1.5}, "min_p is 1.5"),
    ({"min_p": float("nan")}, "min_p is nan"),
    ({"seed": np.array([-1], np.int64)}, "seed has the type int64; it must be UINT64"),
    ({"stop": strings(*[b"x"] * (MAX_STOP_STRINGS + 1))}, f"stop has {MAX_STOP_STRINGS + 1} strings"),
    ({"stop": strings(b"x", b"")}, "stop[1] has 0 bytes"),
    (
        {"stop": strings(b"x" * (MAX_STOP_STRING_BYTES + 1))},
        f"it must have from 1 to {MAX_STOP_STRING_BYTES}",
    ),
    ({"stop": strings(b"\xe2\x82")}, "stop[0] is not valid UTF-8"),
    ({"stream": np.array([1], np.int32)}, "stream has the type int32; it must be BOOL"),
]


@pytest.mark.parametrize(("fields", "sentence"), REFUSALS, ids=[sentence for _, sentence in REFUSALS])
def test_a_bad_value_is_refused_by_name_and_limit(
    parser: RequestParser, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(sentence)):
        parser.parse(tensors(**fields))


def test_a_request_without_a_prompt_is_refused(parser: RequestParser) -> None:
    with pytest.raises(InvalidRequestError, match="neither text_input nor input_ids"):
        parser.parse({})


def test_ids_that_only_the_tokenizer_knows_are_refused(byte_level_tokenizer: Tokenizer) -> None:
    parser = RequestParser(byte_level_tokenizer, DEFAULTS, vocab_size=10, max_model_len=MAX_MODEL_LEN)
    with pytest.raises(InvalidRequestError, match="text_input has token id"):
        parser.parse(tensors())


def test_a_longest_prompt_is_accepted(parser: RequestParser, byte_level_tokenizer: Tokenizer) -> None:
    text = b"zq" * ((MAX_MODEL_LEN - 2) // 2)
    assert len(byte_level_tokenizer.encode(text.decode())) == MAX_MODEL_LEN - 1
    request: GenerationRequest = parser.parse(tensors(text_input=strings(text)))
    assert request.sampling_params.max_tokens == 1
