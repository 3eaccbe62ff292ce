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

from quire_build.tensorrt.machine import copy_bandwidth_gb_s


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
    times = []
    with torch.cuda.stream(stream):
        for _ in range(3 + replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return float(statistics.median(times[3:]))
