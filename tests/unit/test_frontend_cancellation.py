"""The cancellation poller: every request is asked about until it ends, cancelled once, and ended later."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from tests.unit.fake_clock import FakeClock

from quire.serving.frontend.cancellation import END_DELAY_S, CancellationPoller

PATIENCE_S = 30.0


@dataclass(eq=False)
class FakeRequest:
    """Counts how often it is asked."""

    gone: bool = False
    ended: bool = False
    unanswerable: bool = False
    asked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    cancelled: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def is_cancelled(self) -> bool:
        assert not self.cancelled.is_set(), "asked about again after it was cancelled"
        self.asked.release()
        if self.unanswerable:
            raise RuntimeError("the server does not answer")
        return self.gone


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def poller(clock: FakeClock) -> Iterator[CancellationPoller[FakeRequest]]:
    poller = CancellationPoller[FakeRequest](
        lambda request: request.cancelled.set(), lambda request: request.over.set(), clock
    )
    yield poller
    poller.close(PATIENCE_S)


def is_asked_about(request: FakeRequest, times: int) -> bool:
    return all(request.asked.acquire(timeout=PATIENCE_S) for _ in range(times))


def test_only_those_whose_clients_have_gone_are_cancelled(poller: CancellationPoller[FakeRequest]) -> None:
    requests = [FakeRequest(gone=number % 5 == 0) for number in range(60)]
    for request in requests:
        poller.watch(request)
    assert all(request.cancelled.wait(PATIENCE_S) for request in requests if request.gone)
    assert all(is_asked_about(request, times=3) for request in requests if not request.gone)
    assert not any(request.cancelled.is_set() for request in requests if not request.gone)


def test_a_client_that_goes_later_is_noticed(poller: CancellationPoller[FakeRequest]) -> None:
    request = FakeRequest()
    poller.watch(request)
    assert is_asked_about(request, times=2)
    request.gone = True
    assert request.cancelled.wait(PATIENCE_S)


def test_a_request_that_has_ended_is_left_alone(poller: CancellationPoller[FakeRequest]) -> None:
    over, going_on = FakeRequest(gone=True, ended=True), FakeRequest()
    poller.watch(over)
    poller.watch(going_on)
    assert is_asked_about(going_on, times=3)
    assert not over.asked.acquire(blocking=False)
    assert not over.cancelled.is_set()


def test_one_that_cannot_be_asked_about_does_not_keep_others_from_it(
    poller: CancellationPoller[FakeRequest],
) -> None:
    unanswerable, gone = FakeRequest(unanswerable=True), FakeRequest(gone=True)
    poller.watch(unanswerable)
    poller.watch(gone)
    assert gone.cancelled.wait(PATIENCE_S)


def test_a_cancelled_request_ends_a_while_after_it_was_cancelled(
    poller: CancellationPoller[FakeRequest], clock: FakeClock
) -> None:
    first, second, going_on = FakeRequest(gone=True), FakeRequest(), FakeRequest()
    for request in (first, second, going_on):
        poller.watch(request)
    assert first.cancelled.wait(PATIENCE_S)
    clock.now += END_DELAY_S - 0.1
    second.gone = True
    assert second.cancelled.wait(PATIENCE_S)
    assert is_asked_about(going_on, times=3)
    assert not first.over.is_set()
    clock.now += 0.2
    assert first.over.wait(PATIENCE_S)
    assert is_asked_about(going_on, times=3)
    assert not second.over.is_set()
    clock.now += END_DELAY_S
    assert second.over.wait(PATIENCE_S)


def test_a_cancelled_request_ends_when_no_other_is_left(
    poller: CancellationPoller[FakeRequest], clock: FakeClock
) -> None:
    request = FakeRequest(gone=True)
    poller.watch(request)
    assert request.cancelled.wait(PATIENCE_S)
    clock.now += END_DELAY_S
    assert request.over.wait(PATIENCE_S)
