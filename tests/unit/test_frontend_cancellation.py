"""The cancellation poller: every request is asked about until it ends, and cancelled once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from quire.serving.frontend.cancellation import CancellationPoller

PATIENCE_S = 30.0


@dataclass(eq=False)
class FakeRequest:
    """Counts how often it is asked."""

    gone: bool = False
    ended: bool = False
    unanswerable: bool = False
    asked: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    cancelled: threading.Event = field(default_factory=threading.Event)

    def is_cancelled(self) -> bool:
        assert not self.cancelled.is_set(), "asked about again after it was cancelled"
        self.asked.release()
        if self.unanswerable:
            raise RuntimeError("the server does not answer")
        return self.gone


@pytest.fixture
def poller() -> Iterator[CancellationPoller[FakeRequest]]:
    poller = CancellationPoller[FakeRequest](lambda request: request.cancelled.set())
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
