"""One request's responses: deltas in order, then exactly one final response."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import PeerLostError, QuireError, RequestCancelledError
from quire.scheduling.request import FinishReason
from quire.scheduling.sampling_params import SamplingParams
from quire.serving.frontend.request_parsing import GenerationRequest
from quire.serving.frontend.stream import GenerationResponse, ResponseStream
from quire.text.tokenizer import Tokenizer

EOS = 1
TEXT = " the lazy dog 😀 and the end"


def request(
    tokenizer: Tokenizer, *, stream: bool = True, stop: tuple[str, ...] = (), echo: str = ""
) -> GenerationRequest:
    return GenerationRequest(
        tokenizer.encode("the fox"), SamplingParams(stop_token_ids=(EOS,)), stop, stream, echo
    )


def output_ids(tokenizer: Tokenizer, text: str = TEXT) -> list[int]:
    return tokenizer.encode(text)[1:]


def run(
    stream: ResponseStream, groups: list[list[int]], reason: FinishReason = "length"
) -> list[GenerationResponse | QuireError]:
    """Feed groups of tokens, taking a response after each; the end comes with the last group."""
    responses = []
    for number, group in enumerate(groups):
        for token_id in group:
            stream.add_token(token_id)
        if number == len(groups) - 1:
            stream.finish(reason)
        responses.append(stream.take_response())
    return [response for response in responses if response is not None]


def joined(responses: list[GenerationResponse | QuireError]) -> tuple[str, list[int]]:
    generated = [response for response in responses if isinstance(response, GenerationResponse)]
    assert len(generated) == len(responses)
    return (
        "".join(response.text for response in generated),
        [token_id for response in generated for token_id in response.output_ids],
    )


def final(responses: list[GenerationResponse | QuireError]) -> GenerationResponse:
    assert isinstance(responses[-1], GenerationResponse)
    assert [getattr(response, "finish_reason", None) for response in responses[:-1]] == [None] * (
        len(responses) - 1
    )
    return responses[-1]


@given(cuts=st.lists(st.integers(0, 30)))
def test_deltas_make_up_the_output_however_tokens_gathered(
    byte_level_tokenizer: Tokenizer, cuts: list[int]
) -> None:
    ids = output_ids(byte_level_tokenizer)
    places = sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})
    groups = [ids[start:end] for start, end in pairwise(places)]
    responses = run(ResponseStream(request(byte_level_tokenizer), byte_level_tokenizer), groups)
    assert joined(responses) == (TEXT, ids)
    assert len(responses) == len(groups)
    assert final(responses).finish_reason == "length"
    assert final(responses).num_output_tokens == len(ids)
    assert final(responses).num_input_tokens == len(byte_level_tokenizer.encode("the fox"))


def test_without_streaming_there_is_one_response(byte_level_tokenizer: Tokenizer) -> None:
    ids = output_ids(byte_level_tokenizer)
    stream = ResponseStream(request(byte_level_tokenizer, stream=False, echo="the fox"), byte_level_tokenizer)
    assert stream.waits_for_end
    responses = run(stream, [[token_id] for token_id in ids])
    assert joined(responses) == ("the fox" + TEXT, ids)
    assert len(responses) == 1


def test_the_end_token_is_counted_and_has_no_text(byte_level_tokenizer: Tokenizer) -> None:
    ids = [*output_ids(byte_level_tokenizer), EOS]
    responses = run(ResponseStream(request(byte_level_tokenizer), byte_level_tokenizer), [ids], "stop")
    assert joined(responses) == (TEXT, ids)
    assert final(responses).finish_reason == "stop"
    assert final(responses).num_output_tokens == len(ids)


def test_an_echo_comes_first_and_once(byte_level_tokenizer: Tokenizer) -> None:
    ids = output_ids(byte_level_tokenizer)
    stream = ResponseStream(request(byte_level_tokenizer, echo="the fox"), byte_level_tokenizer)
    responses = run(stream, [ids[:1], ids[1:]])
    assert joined(responses) == ("the fox" + TEXT, ids)
    assert isinstance(responses[0], GenerationResponse)
    assert responses[0].text.startswith("the fox")


@given(group_size=st.integers(1, 8))
def test_a_stop_string_ends_with_the_token_that_completes_it(
    byte_level_tokenizer: Tokenizer, group_size: int
) -> None:
    ids = output_ids(byte_level_tokenizer)
    through_stop = next(
        count for count in range(len(ids)) if "dog 😀" in byte_level_tokenizer.decode(ids[:count])
    )
    groups = [ids[start : start + group_size] for start in range(0, len(ids), group_size)]
    stream = ResponseStream(request(byte_level_tokenizer, stop=("xyz", "dog 😀")), byte_level_tokenizer)
    responses = run(stream, groups)
    assert joined(responses) == (" the lazy ", ids[:through_stop])
    assert final(responses).finish_reason == "stop"
    assert final(responses).num_output_tokens == through_stop


def test_a_stop_string_ends_a_request_that_the_scheduler_goes_on_with(
    byte_level_tokenizer: Tokenizer,
) -> None:
    stream = ResponseStream(request(byte_level_tokenizer, stream=False, stop=("lazy",)), byte_level_tokenizer)
    assert not stream.waits_for_end
    for token_id in output_ids(byte_level_tokenizer):
        stream.add_token(token_id)
    response = stream.take_response()
    assert isinstance(response, GenerationResponse)
    assert (response.text, response.finish_reason) == (" the ", "stop")
    assert stream.ended
    assert stream.ended_early
    assert stream.take_response() is None


def test_text_held_back_for_a_stop_string_comes_with_the_end(byte_level_tokenizer: Tokenizer) -> None:
    stream = ResponseStream(request(byte_level_tokenizer, stop=("dog house",)), byte_level_tokenizer)
    ids = output_ids(byte_level_tokenizer, " the dog")
    responses = run(stream, [[token_id] for token_id in ids])
    assert joined(responses) == (" the dog", ids)
    assert final(responses).finish_reason == "length"


def test_an_unfinished_character_comes_with_the_end(byte_level_tokenizer: Tokenizer) -> None:
    ids = output_ids(byte_level_tokenizer, "🂡")[:-1]
    responses = run(ResponseStream(request(byte_level_tokenizer), byte_level_tokenizer), [ids])
    assert joined(responses) == ("\ufffd", ids)


def test_an_error_takes_the_place_of_what_was_still_to_come(byte_level_tokenizer: Tokenizer) -> None:
    stream = ResponseStream(request(byte_level_tokenizer), byte_level_tokenizer)
    first, second = output_ids(byte_level_tokenizer)[:2]
    stream.add_token(first)
    assert isinstance(stream.take_response(), GenerationResponse)
    stream.add_token(second)
    error = PeerLostError("gone")
    stream.fail(error)
    assert stream.take_response() is error
    assert stream.take_response() is None
    assert stream.ended_early


def test_a_cancelled_stream_says_nothing_before_its_release(byte_level_tokenizer: Tokenizer) -> None:
    stream = ResponseStream(request(byte_level_tokenizer), byte_level_tokenizer)
    first, second = output_ids(byte_level_tokenizer)[:2]
    error = RequestCancelledError("gone")
    stream.add_token(first)
    stream.cancel(error)
    stream.add_token(second)
    stream.finish("length")
    assert stream.take_response() is None
    assert not stream.ended
    stream.release()
    assert stream.take_response() is error
    assert stream.ended_early


def test_a_stream_that_finished_before_it_was_cancelled_keeps_its_end(
    byte_level_tokenizer: Tokenizer,
) -> None:
    stream = ResponseStream(request(byte_level_tokenizer), byte_level_tokenizer)
    ids = output_ids(byte_level_tokenizer, " the dog")
    stream.add_token(ids[0])
    stream.finish("length")
    stream.cancel(RequestCancelledError("gone"))
    assert stream.take_response() is None
    stream.release()
    response = stream.take_response()
    assert isinstance(response, GenerationResponse)
    assert (response.output_ids, response.finish_reason) == (ids[:1], "length")


def test_a_release_is_for_good(byte_level_tokenizer: Tokenizer) -> None:
    stream = ResponseStream(request(byte_level_tokenizer), byte_level_tokenizer)
    error = RequestCancelledError("gone")
    stream.release()
    stream.cancel(error)
    assert stream.take_response() is error


def test_a_stream_cancelled_while_a_response_is_being_taken_says_nothing(
    byte_level_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = ResponseStream(request(byte_level_tokenizer), byte_level_tokenizer)
    stream.add_token(output_ids(byte_level_tokenizer)[0])
    lock = OvertakenLock(lambda: stream.cancel(RequestCancelledError("gone")))
    monkeypatch.setattr(stream, "_lock", lock)
    assert stream.take_response() is None
    assert lock.overtaken


class OvertakenLock:
    """A lock that somebody else gets just before whoever asks for it first."""

    def __init__(self, somebody_else: Callable[[], None]) -> None:
        self._somebody_else = somebody_else
        self._lock = threading.Lock()
        self.overtaken = False

    def __enter__(self) -> None:
        if not self.overtaken:
            self.overtaken = True
            self._somebody_else()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.mark.parametrize("later", [PeerLostError("later"), RequestCancelledError("later")])
def test_the_first_end_counts(byte_level_tokenizer: Tokenizer, later: QuireError) -> None:
    stream = ResponseStream(request(byte_level_tokenizer), byte_level_tokenizer)
    stream.add_token(output_ids(byte_level_tokenizer)[0])
    stream.finish("length")
    stream.fail(later)
    response = stream.take_response()
    assert isinstance(response, GenerationResponse)
    assert response.finish_reason == "length"
    assert not stream.ended_early


def test_with_nothing_new_there_is_nothing_to_send(byte_level_tokenizer: Tokenizer) -> None:
    stream = ResponseStream(request(byte_level_tokenizer), byte_level_tokenizer)
    assert stream.take_response() is None
    assert not stream.ended
