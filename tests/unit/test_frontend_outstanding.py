"""Outstanding requests: whatever happens, each client gets exactly one final response."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
from tests.unit.fake_clock import FakeClock

from quire.errors import (
    EngineStepError,
    OverloadedError,
    PeerLostError,
    QuireError,
    RequestCancelledError,
)
from quire.scheduling.sampling_params import SamplingParams
from quire.serving.frontend.cancellation import END_DELAY_S
from quire.serving.frontend.outstanding import NUM_SENDERS, OutstandingRequests
from quire.serving.frontend.request_parsing import GenerationRequest
from quire.serving.frontend.stream import GenerationResponse
from quire.serving.messages import Finished, Refusal, StepTokens, Submit
from quire.text.tokenizer import Tokenizer

PATIENCE_S = 30.0


@dataclass
class FakeClient:
    """Keeps what it is sent; `final` is set by the last response.

    A response is taken after `before_send`, a question answered after `before_answer`.
    """

    cancelled: bool = False
    reachable: bool = True
    responses: list[GenerationResponse | QuireError] = field(default_factory=list)
    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    final: threading.Event = field(default_factory=threading.Event)
    before_send: Callable[[], object] = lambda: None
    before_answer: Callable[[], object] = lambda: None

    def send(self, response: GenerationResponse | QuireError) -> None:
        self.before_send()
        assert not self.final.is_set(), "a response after the final one"
        if not self.reachable:
            raise ConnectionError("nobody there")
        self.responses.append(response)
        if isinstance(response, QuireError) or response.finish_reason is not None:
            self.final.set()
        self.arrived.release()

    def is_cancelled(self) -> bool:
        self.before_answer()
        return self.cancelled

    def result(self) -> GenerationResponse | QuireError:
        assert self.final.wait(PATIENCE_S)
        return self.responses[-1]


@dataclass
class FakeChannel:
    """The scheduler as the frontend sees it, played by the test."""

    on_step: Callable[[StepTokens], None]
    on_refusal: Callable[[Refusal], None]
    on_lost: Callable[[str], None]
    connected: bool = True
    submitted: list[Submit] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    abort_arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    closed: bool = False

    def wait_connected(self, timeout_s: float) -> bool:
        return self.connected

    def submit(self, request: Submit) -> None:
        if not self.connected:
            raise PeerLostError("the scheduler does not answer")
        self.submitted.append(request)

    def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids
        self.abort_arrived.release()

    def close(self) -> None:
        self.closed = True


@dataclass
class Frontend:
    """What a test works with."""

    tokenizer: Tokenizer
    requests: OutstandingRequests
    channel: FakeChannel
    clock: FakeClock

    def accept(self, *, stream: bool = True, stop: tuple[str, ...] = ()) -> tuple[str, FakeClient]:
        client = FakeClient()
        prompt = self.tokenizer.encode("the")
        self.requests.accept(GenerationRequest(prompt, SamplingParams(), stop, stream), client)
        return self.channel.submitted[-1].request_id if self.channel.submitted else "", client

    def step(self, tokens: dict[str, int], finished: dict[str, str] | None = None) -> None:
        ends = [Finished(request_id, "length") for request_id in finished or {}]
        self.channel.on_step(StepTokens(list(tokens), list(tokens.values()), ends))


@contextmanager
def open_frontend(tokenizer: Tokenizer) -> Iterator[Frontend]:
    channels: list[FakeChannel] = []

    def open_channel(
        on_step: Callable[[StepTokens], None],
        on_refusal: Callable[[Refusal], None],
        on_lost: Callable[[str], None],
    ) -> FakeChannel:
        channels.append(FakeChannel(on_step, on_refusal, on_lost))
        return channels[0]

    clock = FakeClock()
    requests = OutstandingRequests(tokenizer, open_channel, clock)
    try:
        yield Frontend(tokenizer, requests, channels[0], clock)
    finally:
        requests.close(PATIENCE_S)


@pytest.fixture
def frontend(byte_level_tokenizer: Tokenizer) -> Iterator[Frontend]:
    with open_frontend(byte_level_tokenizer) as opened:
        yield opened


def text_of(client: FakeClient) -> str:
    return "".join(response.text for response in client.responses if isinstance(response, GenerationResponse))


def test_a_request_travels_to_the_scheduler_and_its_tokens_back(frontend: Frontend) -> None:
    ids = frontend.tokenizer.encode(" lazy dog")[1:]
    request_id, client = frontend.accept()
    assert frontend.channel.submitted[0].prompt_token_ids == frontend.tokenizer.encode("the")
    for token_id in ids[:-1]:
        frontend.step({request_id: token_id})
        assert client.arrived.acquire(timeout=PATIENCE_S)
    frontend.step({request_id: ids[-1]}, {request_id: "length"})
    result = client.result()
    assert isinstance(result, GenerationResponse)
    assert (text_of(client), result.finish_reason, result.num_output_tokens) == (
        " lazy dog",
        "length",
        len(ids),
    )
    assert len(client.responses) == len(ids)
    assert frontend.channel.aborted == []


def test_many_requests_share_a_step_without_mixing(frontend: Frontend) -> None:
    words = [" fox", " dog", " the", " lazy"] * 8
    requests = [(*frontend.accept(), frontend.tokenizer.encode(word)[1:], word) for word in words]
    for position in range(max(len(ids) for _, _, ids, _ in requests)):
        live = [(request_id, ids) for request_id, _, ids, _ in requests if position < len(ids)]
        frontend.step(
            {request_id: ids[position] for request_id, ids in live},
            {request_id: "length" for request_id, ids in live if position == len(ids) - 1},
        )
    for _, client, _, word in requests:
        client.result()
        assert text_of(client) == word


def test_a_stop_string_ends_the_request_here_and_at_the_scheduler(frontend: Frontend) -> None:
    request_id, client = frontend.accept(stop=("lazy",))
    for token_id in frontend.tokenizer.encode(" lazy")[1:]:
        frontend.step({request_id: token_id})
    result = client.result()
    assert isinstance(result, GenerationResponse)
    assert (text_of(client), result.finish_reason) == (" ", "stop")
    assert frontend.channel.abort_arrived.acquire(timeout=PATIENCE_S)
    assert frontend.channel.aborted == [request_id]
    frontend.step({request_id: 7})


def test_a_cancelled_request_is_aborted_at_once_and_ends_as_cancelled_later(frontend: Frontend) -> None:
    request_id, client = frontend.accept()
    others = dict(frontend.accept() for _ in range(NUM_SENDERS))
    client.cancelled = True
    assert frontend.channel.abort_arrived.acquire(timeout=PATIENCE_S)
    assert frontend.channel.aborted == [request_id]
    # Once every sender is at one of the others, the cancelled request, which comes first, has been served.
    all_senders = threading.Barrier(NUM_SENDERS)
    for other in others.values():
        other.before_send = lambda: all_senders.wait(PATIENCE_S)
    frontend.step(dict.fromkeys([request_id, *others], 7), dict.fromkeys(others, "length"))
    assert all(isinstance(other.result(), GenerationResponse) for other in others.values())
    assert client.responses == []
    frontend.clock.now += END_DELAY_S
    assert isinstance(client.result(), RequestCancelledError)
    assert len(client.responses) == 1


def test_closing_ends_what_is_cancelled_but_has_not_ended(byte_level_tokenizer: Tokenizer) -> None:
    with open_frontend(byte_level_tokenizer) as frontend:
        _, client = frontend.accept()
        client.cancelled = True
        assert frontend.channel.abort_arrived.acquire(timeout=PATIENCE_S)
    assert isinstance(client.result(), RequestCancelledError)


def test_closing_ends_what_is_found_cancelled_only_afterwards(frontend: Frontend) -> None:
    asked, may_answer, may_send = threading.Event(), threading.Event(), threading.Event()
    blocked = [frontend.accept() for _ in range(NUM_SENDERS)]
    for _, other in blocked:
        other.before_send = lambda: may_send.wait(PATIENCE_S)
    frontend.step({request_id: 7 for request_id, _ in blocked})
    request_id, client = frontend.accept()

    def answer_late() -> None:
        asked.set()
        may_answer.wait(PATIENCE_S)

    client.before_answer = answer_late
    assert asked.wait(PATIENCE_S)
    client.cancelled = True
    frontend.requests.close(0)
    may_answer.set()
    assert frontend.channel.abort_arrived.acquire(timeout=PATIENCE_S)
    assert frontend.channel.aborted == [request_id]
    may_send.set()
    assert isinstance(client.result(), PeerLostError)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("OverloadedError", OverloadedError), ("EngineStepError", EngineStepError), ("Unheard", QuireError)],
)
def test_a_refusal_keeps_its_class_and_sentence(
    frontend: Frontend, name: str, kind: type[QuireError]
) -> None:
    request_id, client = frontend.accept()
    frontend.channel.on_refusal(Refusal(request_id, name, "the queue is full"))
    result = client.result()
    assert type(result) is kind
    assert str(result) == "the queue is full"


def test_a_lost_scheduler_ends_what_it_had(frontend: Frontend) -> None:
    clients = dict(frontend.accept() for _ in range(5))
    for request_id in clients:
        frontend.channel.on_lost(request_id)
    assert {type(client.result()) for client in clients.values()} == {PeerLostError}


def test_without_a_scheduler_requests_are_refused_at_once(frontend: Frontend) -> None:
    frontend.channel.connected = False
    _, client = frontend.accept()
    assert isinstance(client.result(), PeerLostError)


def test_a_client_out_of_reach_costs_the_scheduler_nothing_more(frontend: Frontend) -> None:
    request_id, client = frontend.accept()
    client.reachable = False
    frontend.step({request_id: 7})
    assert frontend.channel.abort_arrived.acquire(timeout=PATIENCE_S)
    assert frontend.channel.aborted == [request_id]


def test_output_that_cannot_be_decoded_is_an_error(frontend: Frontend) -> None:
    request_id, client = frontend.accept()
    frontend.step({request_id: -1})
    result = client.result()
    assert type(result) is QuireError
    assert frontend.channel.abort_arrived.acquire(timeout=PATIENCE_S)


def test_closing_ends_requests_and_threads(byte_level_tokenizer: Tokenizer) -> None:
    before = threading.active_count()
    with open_frontend(byte_level_tokenizer) as frontend:
        clients = [frontend.accept(stream=stream)[1] for stream in (True, False)]
    assert [type(client.result()) for client in clients] == [PeerLostError, PeerLostError]
    assert frontend.channel.closed
    assert threading.active_count() == before
