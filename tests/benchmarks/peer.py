"""A contender in a process and a Python of its own, asked for one measurement after the other.

`Peer` is the side that asks, `answer` the side that measures. Questions and answers are lines of JSON on
standard input and output. This module imports nothing but the standard library, because its second half
runs in the peer's Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


class Peer:
    """A script under another Python.

    Args:
        python: the interpreter.
        script: name of a file beside this one that calls `answer`.
        arguments: of the script.
    """

    def __init__(self, python: str, script: str, *arguments: str) -> None:
        path = Path(__file__).with_name(script)
        self._script = script
        self._process = subprocess.Popen(
            [python, str(path), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(path.parent)},
        )
        self.description = self._answer()

    def measure(self, name: str, **arguments: object) -> Any:
        """What the function `name` of the workload returns for the peer."""
        assert self._process.stdin is not None
        print(json.dumps([name, arguments]), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer ended; run {self._script} with its Python to see why")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()


def answer(workload: ModuleType, make_contender: Callable[[], object], description: object) -> None:
    """Say what the peer is once it is ready, then run functions of `workload` until standard input ends."""
    # What the contender prints to standard output must not get among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = make_contender()
    print(json.dumps(description), file=answers, flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(getattr(workload, name)(contender, **arguments)), file=answers, flush=True)
