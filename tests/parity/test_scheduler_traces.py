"""The scheduler's decisions are vLLM 0.33's, block for block."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.parity import replay_vllm_trace as parity

TRACES = sorted((Path(__file__).parent / "traces").glob("*.jsonl.xz"))
CROWDED = next(trace for trace in TRACES if trace.name.startswith("fcfs_pc_async_48b"))


def test_all_sixteen_recorded_traces_are_there() -> None:
    assert len(TRACES) == 16


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name.removesuffix(".jsonl.xz"))
def test_every_decision_equals_the_recorded_one(trace: Path) -> None:
    assert parity.replay(trace) > 90


def write_trace(path: Path, header: Any, steps: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *steps)))


def run_program(*files: Path) -> subprocess.CompletedProcess[str]:
    program = Path(parity.__file__)
    return subprocess.run(
        [sys.executable, str(program), *map(str, files)], capture_output=True, text=True, check=False
    )


def test_program_accepts_plain_and_compressed_files_and_counts_them(tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl"
    write_trace(plain, *parity.read_trace(CROWDED))
    run = run_program(plain, CROWDED)
    assert (run.returncode, run.stdout) == (0, "2 traces equal\n")


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("num", []), ("cached", []), ("preempted", ["r1"]), ("outputs", []), ("free", 0), ("waiting", ["r1"])],
)
def test_program_names_the_first_divergence(tmp_path: Path, field: str, wrong: object) -> None:
    header, steps = parity.read_trace(CROWDED)
    expected = steps[40][field]
    assert expected != wrong
    steps[40][field] = wrong
    steps[50]["free"] = -1
    changed = tmp_path / "changed.jsonl"
    write_trace(changed, header, steps)
    run = run_program(changed)
    assert run.returncode == 1
    assert f"step 40, {field}:" in run.stdout
    assert f"expected {wrong}" in run.stdout
    assert f"got      {expected}" in run.stdout
