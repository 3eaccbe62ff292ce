"""What the whole engine delivers in process: scheduler, step loop, OpenVINO and sampler, without Triton.

    python tests/benchmarks/engine.py --checkpoint DIRECTORY [--peer-python PYTHON]
    python tests/benchmarks/engine.py --shape 101m [--peer-python PYTHON]      random weights
    python tests/benchmarks/engine.py --repository REPOSITORY                  already built

Tokens per second at several numbers of requests that arrive together, time to the first token of a prompt
of 512 tokens, of a long one, and of the same long one when it is cached; and, from a simulation without an
engine, how much of the memory that block tables own holds tokens. With a Python that can import vLLM's CPU
build, vLLM does the same in turns with Quire, and ratios of the medians are printed. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine_workload as workload
from block_occupancy import block_occupancy
from machine import machine
from peer import Peer
from random_checkpoint import SHAPES, write_random_checkpoint

from quire.engine_core import EngineCore
from quire.execution.manifest import Manifest, read_manifest
from quire.execution.openvino import OpenVINOEngine, OpenVINOExecutor
from quire.execution.sampler import Sampler
from quire.interface import ENGINE
from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig
from quire_build.pipeline import build
from quire_build.repository import VERSION

NUM_REQUESTS = (1, 8, 32, 128, 256)
SHORT_PROMPT, LONG_PROMPT = 512, 2048
ROOM_FOR_OUTPUT = 128
"""Tokens that a long prompt leaves free below the model's limit."""
LEAST_SPEEDUP_OF_CACHED_PROMPT = 10
LEAST_OCCUPANCY = 0.96
STEP_TIMEOUT_S = 600
QUIET = 0.05
"""Share of the machine that others may take of a round that counts."""
MOST_ATTEMPTS = 4
"""Rounds that are run, at most, for each that is wanted."""

Figures = dict[str, float]
Round = dict[str, Figures]
"""By contender."""
Measure = Callable[..., Figures]
"""Runs one function of the workload, by name and arguments."""


class QuireContender:
    """The engine as the server has it, but for Triton between scheduler and engine."""

    def __init__(self, engine_dir: Path, kv_cache_bytes: int) -> None:
        engine = OpenVINOEngine(engine_dir, kv_cache_bytes=kv_cache_bytes)
        config = SchedulerConfig(
            num_blocks=engine.pool_info.num_blocks,
            block_size=engine.manifest.block_size,
            max_num_batched_tokens=engine.limits.max_num_batched_tokens,
            max_num_seqs=engine.limits.max_num_seqs,
            max_model_len=engine.limits.max_model_len,
        )
        self._core = EngineCore(
            Scheduler(config), OpenVINOExecutor(engine), Sampler(), step_timeout_s=STEP_TIMEOUT_S
        )

    def generate(self, prompts: list[list[int]], max_tokens: int) -> int:
        parameters = SamplingParams(max_tokens=max_tokens, temperature=0)
        for index, prompt in enumerate(prompts):
            self._core.add_request(Request(str(index), prompt, parameters))
        num_tokens = 0
        while self._core.has_work:
            result = self._core.step()
            if result.failures:
                raise result.failures[0][1]
            num_tokens += len(result.outputs)
        return num_tokens

    def measure(self, name: str, **arguments: Any) -> Figures:
        figures: Figures = getattr(workload, name)(self, **arguments)
        return figures


class Rounds:
    """Measures all contenders in turns, so that a machine that gets slower does so for all of them.

    A first round warms up. A round in which other processes took more than `QUIET` of the machine from any
    contender is repeated, within limits; the least disturbed rounds count.
    """

    def __init__(self, contenders: dict[str, Measure], rounds: int) -> None:
        self._contenders = contenders
        self._rounds = rounds
        self._seeds = itertools.count(step=1000)

    def run(self, name: str, **arguments: object) -> dict[str, Any]:
        """Figures by name and contender, and how far each round was disturbed."""
        self._round(name, arguments)
        rounds: list[Round] = []
        while (
            sum(_disturbance(round_) <= QUIET for round_ in rounds) < self._rounds
            and len(rounds) < self._rounds * MOST_ATTEMPTS
        ):
            rounds.append(self._round(name, arguments))
            print(name, arguments, rounds[-1], file=sys.stderr)
        kept = sorted(rounds, key=_disturbance)[: self._rounds]
        figures = [figure for figure in kept[0]["quire"] if figure != "taken_by_others"]
        return {
            **{figure: _compare(kept, figure) for figure in figures},
            "taken_by_others": [round(_disturbance(round_), 3) for round_ in kept],
        }

    def _round(self, name: str, arguments: dict[str, object]) -> Round:
        seed = next(self._seeds)
        measures = self._contenders.items()
        return {contender: measure(name, **arguments, seed=seed) for contender, measure in measures}


def _compare(rounds: list[Round], figure: str) -> dict[str, Any]:
    """Median and rounds of each contender for one figure, and the ratio of Quire's median to the peer's."""
    samples = {name: [_rounded(round_[name][figure]) for round_ in rounds] for name in rounds[0]}
    medians = {name: _rounded(statistics.median(values)) for name, values in samples.items()}
    result: dict[str, Any] = {**medians, "rounds": samples}
    if "vllm" in medians:
        result["ratio"] = round(medians["quire"] / medians["vllm"], 3)
    return result


def _disturbance(round_: Round) -> float:
    return max(figures["taken_by_others"] for figures in round_.values())


def _rounded(value: float) -> float:
    """Four significant digits."""
    return float(f"{value:.4g}")


def measure_generation(rounds: Rounds, num_requests: list[int]) -> list[dict[str, Any]]:
    return [{"requests": number, **rounds.run("generation", num_requests=number)} for number in num_requests]


def measure_first_token(rounds: Rounds, manifest: Manifest) -> list[dict[str, Any]]:
    """First tokens of a short and a long prompt; of the long one a cached copy is held to a figure."""
    longest = manifest.limits.max_model_len - ROOM_FOR_OUTPUT
    rows = []
    for prompt_tokens in (SHORT_PROMPT, min(LONG_PROMPT, longest)):
        figures = rounds.run("first_token", prompt_tokens=prompt_tokens)
        speedup = figures["cold_ms"]["quire"] / figures["cached_ms"]["quire"]
        row = {"prompt_tokens": prompt_tokens, **figures, "speedup_of_cached": round(speedup, 1)}
        if prompt_tokens != SHORT_PROMPT:
            row |= {
                "limit": LEAST_SPEEDUP_OF_CACHED_PROMPT,
                "held": speedup >= LEAST_SPEEDUP_OF_CACHED_PROMPT,
            }
        rows.append(row)
    return rows


def measure_occupancy() -> list[dict[str, Any]]:
    rows = [block_occupancy(mean_length, block_size) for mean_length, block_size in ((512, 16), (1024, 32))]
    return [
        row | {"limit": LEAST_OCCUPANCY, "held": row["tokens_over_slots"] >= LEAST_OCCUPANCY} for row in rows
    ]


def start_peer(python: str, checkpoint: Path, manifest: Manifest, kv_cache_gib: int) -> Peer:
    """vLLM with the limits of the engine it is compared with."""
    limits = manifest.limits
    numbers = (limits.max_model_len, limits.max_num_seqs, limits.max_num_batched_tokens, kv_cache_gib)
    return Peer(python, "vllm_engine.py", str(checkpoint), *map(str, numbers))


@contextlib.contextmanager
def built(options: argparse.Namespace) -> Iterator[tuple[Path | None, Path]]:
    """The checkpoint, if there is one, and the engine directory; what was made for this run goes with it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint: Path | None = options.checkpoint
        repository: Path | None = options.repository
        if options.shape:
            checkpoint = Path(folder) / "checkpoint"
            checkpoint.mkdir()
            write_random_checkpoint(options.shape, checkpoint)
        if repository is None:
            assert checkpoint is not None
            repository = Path(folder) / "repository"
            build(checkpoint, repository, precision=options.precision)
        yield checkpoint, repository / ENGINE / VERSION


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="Hugging Face directory, built for this run")
    what.add_argument("--shape", choices=SHAPES, help="parameters of a checkpoint with random weights")
    what.add_argument("--repository", type=Path, help="model repository that `quire build` made")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32", help="of the build")
    parser.add_argument("--peer-python", help="a Python that can import vLLM's CPU build; float32 only")
    parser.add_argument("--requests", type=int, nargs="+", default=NUM_REQUESTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kv-cache-gib", type=int, default=4)
    options = parser.parse_args()
    if options.peer_python and (options.repository or options.precision != "float32"):
        parser.error("--peer-python needs --checkpoint or --shape, in float32")

    with built(options) as (checkpoint, engine_dir), contextlib.ExitStack() as stack:
        manifest = read_manifest(engine_dir)
        quire = QuireContender(engine_dir, options.kv_cache_gib * 2**30)
        contenders: dict[str, Measure] = {"quire": quire.measure}
        result: dict[str, Any] = {"machine": machine(), "engine": describe(options, manifest)}
        if options.peer_python:
            assert checkpoint is not None
            peer = start_peer(options.peer_python, checkpoint, manifest, options.kv_cache_gib)
            stack.callback(peer.close)
            contenders["vllm"] = peer.measure
            result["peer"] = peer.description
        rounds = Rounds(contenders, options.rounds)
        result["generation"] = measure_generation(rounds, options.requests)
        result["first_token"] = measure_first_token(rounds, manifest)
    result["block_occupancy"] = measure_occupancy()
    json.dump(result, sys.stdout, indent=2)
    print()


def describe(options: argparse.Namespace, manifest: Manifest) -> dict[str, Any]:
    """What was measured."""
    return {
        "checkpoint": options.shape or (options.checkpoint or options.repository).name,
        "precision": manifest.precision,
        "block_size": manifest.block_size,
        "prompt_tokens": workload.PROMPT_TOKENS,
        "output_tokens": workload.OUTPUT_TOKENS,
    }


if __name__ == "__main__":
    main()
