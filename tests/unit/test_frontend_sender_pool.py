"""The sender pool: every wake is answered, one thread at a time for each stream, none held up by another."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from quire.serving.frontend.sender_pool import SenderPool

PATIENCE_S = 30.0


@contextmanager
def pool_of(serve: Callable[[str], None], num_threads: int) -> Iterator[SenderPool[str]]:
    pool: SenderPool[str] = SenderPool(serve, num_threads)
    try:
        yield pool
    finally:
        pool.close(PATIENCE_S)


def test_a_slow_stream_does_not_hold_up_another() -> None:
    release, served = threading.Event(), threading.Event()

    def serve(stream: str) -> None:
        if stream == "slow":
            release.wait(PATIENCE_S)
        else:
            served.set()

    with pool_of(serve, 2) as pool:
        pool.wake(["slow"])
        pool.wake(["quick"])
        assert served.wait(PATIENCE_S)
        release.set()


def test_wakes_during_a_turn_bring_exactly_one_more() -> None:
    turns: list[str] = []
    started, release = threading.Event(), threading.Event()

    def serve(stream: str) -> None:
        turns.append(stream)
        if len(turns) == 1:
            started.set()
            release.wait(PATIENCE_S)

    with pool_of(serve, 3) as pool:
        pool.wake(["a"])
        assert started.wait(PATIENCE_S)
        for _ in range(5):
            pool.wake(["a"])
        release.set()
    assert turns == ["a", "a"]


def test_a_free_thread_leaves_a_stream_to_the_one_that_serves_it() -> None:
    turns: list[str] = []
    started, other_served, release = threading.Event(), threading.Event(), threading.Event()

    def serve(stream: str) -> None:
        turns.append(stream)
        if stream == "other":
            other_served.set()
        else:
            started.set()
            release.wait(PATIENCE_S)

    with pool_of(serve, 2) as pool:
        pool.wake(["busy"])
        assert started.wait(PATIENCE_S)
        pool.wake(["busy", "other"])
        assert other_served.wait(PATIENCE_S)
        assert turns == ["busy", "other"]
        release.set()
    assert turns == ["busy", "other", "busy"]


def test_no_wake_is_lost() -> None:
    pending: Counter[str] = Counter()
    lock = threading.Lock()

    def serve(stream: str) -> None:
        with lock:
            pending[stream] = 0

    streams = [f"stream {number}" for number in range(7)]
    with pool_of(serve, 4) as pool:

        def wake_often() -> None:
            for _ in range(200):
                with lock:
                    for stream in streams:
                        pending[stream] += 1
                pool.wake(streams)

        wakers = [threading.Thread(target=wake_often) for _ in range(3)]
        for waker in wakers:
            waker.start()
        for waker in wakers:
            waker.join(PATIENCE_S)
    assert pending.total() == 0


def test_streams_are_served_in_the_order_of_waking() -> None:
    turns: list[str] = []
    started, release = threading.Event(), threading.Event()

    def serve(stream: str) -> None:
        if stream == "first":
            started.set()
            release.wait(PATIENCE_S)
        turns.append(stream)

    with pool_of(serve, 1) as pool:
        pool.wake(["first"])
        assert started.wait(PATIENCE_S)
        pool.wake(["a", "b", "c"])
        pool.wake(["a"])
        release.set()
    assert turns == ["first", "a", "b", "c"]


def test_closing_ends_the_threads_after_what_is_waiting() -> None:
    turns: list[str] = []
    before = threading.active_count()
    with pool_of(turns.append, 3) as pool:
        pool.wake([str(number) for number in range(50)])
    assert sorted(turns, key=int) == [str(number) for number in range(50)]
    assert threading.active_count() == before
