"""What clients get of a model repository with a TensorRT plan: tokens per second, first tokens, gaps.

    python tests/benchmarks/gpu_serving.py OUT.json REPOSITORY ... [--streams 1 32 256] [--seconds 10]

Each repository is served by itself, one after the other, because a GPU's memory holds one of them. The
clients are those of serving.py: streams over gRPC, each sending the next request when one has ended, with
prompts of 128 tokens and 128 tokens of output; then 1024 such streams that arrive together and are run to
their end. The server's whole log is kept beside OUT.json. Where Triton hosts the plan, `engine_ms` is what it
says of a call: all of it, and the part that the GPU computed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch
from google.protobuf import text_format
from gpu_plan import DTYPES, LIMITS, RandomWeights, Shape, build_random_plan
from gpu_timing import Results
from random_checkpoint import write_tokenizer
from serving import (
    LOAD_TIMEOUT_S,
    PROMPT_IDS,
    REQUEST_TIMEOUT_S,
    Load,
    busiest_threads,
    measure,
    own_server,
)
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

from quire.execution.manifest import read_manifest
from quire.interface import ENGINE, EnginePlacement
from quire_build.repository import DEFAULT_FRONTENDS, engine_dir, write_configs, write_model_files
from quire_build.tensorrt.hosted_memory import host_reserve_bytes
from quire_build.tensorrt.machine import this_gpu
from quire_client import AsyncClient

STREAMS = (1, 32, 256)
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 128
CLIENTS = 4
TOGETHER = 1024
"""Requests that arrive together."""
MEMORY_SHARE = 0.9


def random_repository(shape: Shape, repository: Path, placement: EnginePlacement) -> dict[str, float]:
    """A repository with random weights, as `quire build` makes one, unless it is there.

    Returns:
        Seconds that parts of the build took; nothing if the repository was there.
    """
    directory = engine_dir(repository, placement)
    if (directory / "engine.json").is_file():
        return {}
    directory.mkdir(parents=True)
    hosted = placement is EnginePlacement.HOSTED
    pool_bytes = 0
    if hosted:
        config, dtype = shape.decoder_config, DTYPES[shape.precision]
        weight_bytes = RandomWeights(config, 1, dtype).num_elements * dtype.itemsize
        kept = weight_bytes + host_reserve_bytes(config, LIMITS, dtype.itemsize)
        pool_bytes = int(this_gpu().memory_bytes * MEMORY_SHARE) - kept
    seconds = build_random_plan(shape, directory, pool_bytes=pool_bytes)
    write_configs(repository, DEFAULT_FRONTENDS, placement, read_manifest(directory) if hosted else None)
    checkpoint = repository.with_name(f"{repository.name}-checkpoint")
    checkpoint.mkdir(exist_ok=True)
    write_tokenizer(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(shape.config))
    write_model_files(repository, checkpoint, ("config.json", "tokenizer.json"))
    return seconds


def serve_and_measure(
    repository: Path,
    log: Path,
    streams: Sequence[int] = STREAMS,
    seconds: float = 10,
    load_timeout_s: float = LOAD_TIMEOUT_S,
) -> Iterator[dict[str, Any]]:
    """Serve a repository and yield a row for each number of streams; the first says how long loading took.

    Raises:
        ServerNotReadyError: it was not loaded in time; says what server and GPU did meanwhile.
    """
    torch.cuda.empty_cache()  # the server wants what this process has freed
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(
            own_server(
                repository,
                log=log,
                load_timeout_s=load_timeout_s,
                describe=lambda: f"{busiest_threads()}; GPU: {gpu_state()}",
            )
        )
        yield {"ready_after_s": round(time.monotonic() - began, 1), "gpu": gpu_state()}
        manager = stack.enter_context(multiprocessing.get_context("spawn").Manager())
        for number in streams:
            before = engine_times(url)
            row = measure(Load(url, seconds, PROMPT_TOKENS, OUTPUT_TOKENS), number, CLIENTS, manager)
            yield row | engine_ms(before, engine_times(url))
        measure_together(url, CLIENTS, manager)
        yield measure_together(url, TOGETHER, manager)


def measure_together(url: str, num_requests: int, manager: SyncManager) -> dict[str, Any]:
    """Requests that all arrive at once, each over a stream of its own, until the last one is done."""
    barrier = manager.Barrier(CLIENTS)
    with ProcessPoolExecutor(CLIENTS, mp_context=multiprocessing.get_context("spawn")) as pool:
        seeds = range(CLIENTS)
        futures = [pool.submit(run_together, url, num_requests // CLIENTS, seed, barrier) for seed in seeds]
        reports = [future.result() for future in futures]
    seconds = max(ended for _, ended in reports) - min(began for began, _ in reports)
    return {
        "requests": f"{num_requests} x {PROMPT_TOKENS}/{OUTPUT_TOKENS}",
        "tokens_per_s": round(num_requests * OUTPUT_TOKENS / seconds),
        "s": round(seconds, 2),
    }


def run_together(url: str, num_requests: int, seed: int, barrier: Any) -> tuple[float, float]:
    """One client process: when it sent its first request, and when the last one was done."""
    return asyncio.run(_run_together(url, num_requests, seed, barrier))


async def _run_together(url: str, num_requests: int, seed: int, barrier: Any) -> tuple[float, float]:
    rng = random.Random(seed)
    prompts = [rng.choices(PROMPT_IDS, k=PROMPT_TOKENS) for _ in range(num_requests)]

    async def run(client: AsyncClient, prompt: list[int]) -> None:
        num_tokens = 0
        async with client.stream(prompt, max_tokens=OUTPUT_TOKENS, temperature=0) as stream:
            async for delta in stream:
                num_tokens += len(delta.token_ids)
        if num_tokens != OUTPUT_TOKENS:
            raise RuntimeError(f"a request ended after {num_tokens} tokens")

    async with AsyncClient(url, timeout_s=REQUEST_TIMEOUT_S) as client:
        if not await client.is_ready():
            barrier.abort()  # the others need not wait for this one
            raise RuntimeError("the server is not ready, or no more")
        await asyncio.to_thread(barrier.wait, REQUEST_TIMEOUT_S)
        began = time.monotonic()
        await asyncio.gather(*(run(client, prompt) for prompt in prompts))
    return began, time.monotonic()


def gpu_state() -> str:
    """How busy the GPU is, and how much of its memory is used."""
    query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def engine_times(url: str) -> dict[str, int]:
    """What Triton counted of the calls of a hosted engine: calls, and nanoseconds by what they went to."""
    with contextlib.closing(InferenceServerClient(url)) as client:
        try:
            [model] = client.get_inference_statistics(ENGINE).model_stats
        except InferenceServerException:  # it is in the scheduler's process
            return {}
    counted = model.inference_stats
    return {
        "calls": counted.success.count,
        "whole": counted.success.ns,
        "gpu": counted.compute_infer.ns,
    }


def engine_ms(before: dict[str, int], after: dict[str, int]) -> dict[str, Any]:
    """Mean times of the calls between two readings."""
    calls = after.get("calls", 0) - before.get("calls", 0)
    if calls == 0:
        return {}
    times = {name: round((after[name] - before[name]) / calls / 1e6, 3) for name in ("whole", "gpu")}
    return {"engine_calls": calls, "engine_ms": times}


@contextlib.contextmanager
def without_graphs(repository: Path) -> Iterator[None]:
    """Have Triton host the repository's plan without CUDA graphs while the block runs."""
    path = repository / ENGINE / "config.pbtxt"
    text = path.read_text()
    config = text_format.Parse(text, ModelConfig())
    config.optimization.ClearField("cuda")
    path.write_text(text_format.MessageToString(config))
    try:
        yield
    finally:
        path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("repositories", type=Path, nargs="+")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--seconds", type=float, default=10, help="of measurement for each number of streams")
    options = parser.parse_args()
    results = Results(options.out)
    for repository in options.repositories:
        log = options.out.with_name(f"{options.out.stem}-{repository.name}.log")
        for row in serve_and_measure(repository, log, options.streams, options.seconds):
            results.add(serving=str(repository), **row)


if __name__ == "__main__":
    main()
