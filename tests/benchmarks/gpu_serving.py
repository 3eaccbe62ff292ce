"""What clients get of a model repository with a TensorRT plan: tokens per second, first tokens, gaps.

    python tests/benchmarks/gpu_serving.py OUT.json REPOSITORY ... [--streams 1 32 256] [--seconds 10]

Each repository is served by itself, one after the other, because a GPU's memory holds one of them. The
clients are those of serving.py: streams over gRPC, each sending the next request when one has ended, with
prompts of 128 tokens and 128 tokens of output.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_plan import DTYPES, RandomWeights, Shape, build_random_plan
from gpu_timing import Results
from random_checkpoint import write_tokenizer
from serving import Load, measure, own_server

from quire.execution.manifest import read_manifest
from quire.interface import EnginePlacement
from quire_build.repository import DEFAULT_FRONTENDS, engine_dir, write_configs, write_model_files
from quire_build.tensorrt.builder import HOST_RESERVE_BYTES, PLAN_FILE
from quire_build.tensorrt.machine import this_gpu

STREAMS = (1, 32, 256)
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 128
CLIENTS = 4
MEMORY_SHARE = 0.9
ENGINE_FILES = (PLAN_FILE, "engine.json")


def random_repository(
    shape: Shape, repository: Path, placement: EnginePlacement, plan: Path | None = None
) -> dict[str, float]:
    """A repository with random weights, as `quire build` makes one; its plan can be hosted by Triton.

    Args:
        shape: of the model.
        repository: to make, unless it is there.
        placement: of the engine.
        plan: folder of a plan that this one shares its files with; None to build one.

    Returns:
        Seconds that parts of the build took; nothing if the repository was there.
    """
    directory = engine_dir(repository, placement)
    if (directory / "engine.json").is_file():
        return {}
    directory.mkdir(parents=True)
    seconds: dict[str, float] = {}
    if plan is None:
        weight_bytes = RandomWeights(shape.decoder_config, 1, DTYPES[shape.precision]).num_elements * 2
        pool_bytes = int(this_gpu().memory_bytes * MEMORY_SHARE) - weight_bytes - HOST_RESERVE_BYTES
        seconds = build_random_plan(shape, directory, pool_bytes=pool_bytes)
    else:
        for name in ENGINE_FILES:
            os.link(plan / name, directory / name)
    hosted = placement is EnginePlacement.HOSTED
    write_configs(repository, DEFAULT_FRONTENDS, placement, read_manifest(directory) if hosted else None)
    checkpoint = repository.with_name(f"{repository.name}-checkpoint")
    checkpoint.mkdir(exist_ok=True)
    write_tokenizer(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(shape.config))
    write_model_files(repository, checkpoint, ("config.json", "tokenizer.json"))
    return seconds


def serve_and_measure(
    repository: Path, streams: Sequence[int] = STREAMS, seconds: float = 10
) -> Iterator[dict[str, Any]]:
    """Serve a repository and yield a row for each number of streams; the first says how long loading took."""
    torch.cuda.empty_cache()  # the server wants what this process has freed
    began = time.monotonic()
    with own_server(repository) as url, multiprocessing.get_context("spawn").Manager() as manager:
        yield {"ready_after_s": round(time.monotonic() - began, 1)}
        for number in streams:
            yield measure(Load(url, seconds, PROMPT_TOKENS, OUTPUT_TOKENS), number, CLIENTS, manager)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("repositories", type=Path, nargs="+")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--seconds", type=float, default=10, help="of measurement for each number of streams")
    options = parser.parse_args()
    results = Results(options.out)
    for repository in options.repositories:
        for row in serve_and_measure(repository, options.streams, options.seconds):
            results.add(serving=str(repository), **row)


if __name__ == "__main__":
    main()
