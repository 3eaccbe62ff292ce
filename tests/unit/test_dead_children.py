"""A server that waits for a child that has died, played by this process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from quire.launcher.dead_children import UNCOLLECTED_S, DeadChildren
from quire.serving.watchdog import Process


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def kill(child: subprocess.Popen[bytes]) -> None:
    """Kill it without collecting it."""
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


@pytest.fixture
def dead_children() -> DeadChildren:
    return DeadChildren(Process.running(os.getpid()))


def test_a_child_counts_once_it_has_been_seen_dead_for_long_enough(
    child: subprocess.Popen[bytes], dead_children: DeadChildren
) -> None:
    assert dead_children.cause_of_death(0.0) is None
    kill(child)
    assert dead_children.cause_of_death(100.0) is None
    assert dead_children.cause_of_death(100.0 + UNCOLLECTED_S / 2) is None
    assert dead_children.cause_of_death(100.0 + UNCOLLECTED_S) == "killed by SIGKILL"


def test_a_child_that_is_collected_late_does_not_count(
    child: subprocess.Popen[bytes], dead_children: DeadChildren
) -> None:
    kill(child)
    assert dead_children.cause_of_death(0.0) is None
    child.wait()
    assert dead_children.cause_of_death(UNCOLLECTED_S) is None


def test_children_that_die_one_after_the_other_are_not_taken_for_one(
    child: subprocess.Popen[bytes], dead_children: DeadChildren
) -> None:
    with subprocess.Popen(["sleep", "600"]) as other:
        kill(other)
        assert dead_children.cause_of_death(0.0) is None
    kill(child)
    assert dead_children.cause_of_death(UNCOLLECTED_S) is None


def test_children_that_live_do_not_count(child: subprocess.Popen[bytes], dead_children: DeadChildren) -> None:
    assert dead_children.cause_of_death(0.0) is None
    assert dead_children.cause_of_death(10 * UNCOLLECTED_S) is None
