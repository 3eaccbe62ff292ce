"""Times on a GPU: medians of CUDA graph replays, beside the copy bandwidth of the same process."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Results:
    """Rows of results, written to a file after each, so that a run cut short leaves what it had."""

    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, [machine()]
        self.bandwidth_gb_s = copy_bandwidth_gb_s()
        self.add(copy_gb_s=round(self.bandwidth_gb_s))

    def add(self, **row: Any) -> None:
        """Keep and print one row."""
        self._rows.append(row)
        print(json.dumps(row), flush=True)
        self._path.write_text(json.dumps(self._rows, indent=1))

    def share_of_bandwidth(self, num_bytes: float, time_ms: float) -> float:
        """Bytes over time, over the copy bandwidth."""
        return round(num_bytes / time_ms / 1e6 / self.bandwidth_gb_s, 3)


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return {"gpu": gpu, "torch": torch.__version__, "python": platform.python_version()}


def copy_bandwidth_gb_s() -> float:
    """Device-to-device copy of 4 GiB: bytes read plus bytes written, over time.

    Not in a graph: there a copy is a node of its own kind, and took half as long again on an H200.
    """
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e6


def graph_time_ms(step: Callable[[int], object], replays: int = 15) -> float:
    """Median time of a CUDA graph of `step`, which is called with the stream to work on."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(stream.cuda_stream)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step(stream.cuda_stream)
    with torch.cuda.stream(stream):
        return median_ms(graph.replay, replays)


def median_ms(work: Callable[[], object], rounds: int = 15) -> float:
    """Median time of what `work` queues on the current stream, after three rounds that don't count."""
    times = []
    for _ in range(3 + rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times[3:]))
