"""Everything about the TensorRT half that needs a GPU, in stages that are each useful alone.

    make gpu-check STAGE=builder OUT=results
    python tests/benchmarks/gpu_check.py --stage 8b --out results    (backends, build, client on PYTHONPATH)

builder     two layers of Llama-3-8B's shape, built, loaded and compared with the torch module
kernels     each kernel by itself: gpu_linear.py, gpu_kernels.py, gpu_sampling.py
8b, 7b      decode steps, prompts and whole requests at that shape with random weights, beside vLLM's figures
hosted      the same plan hosted by Triton and in the scheduler's process, to clients that stream; the
            servers' logs are left in OUT, and where Triton can't load it, it is tried without CUDA graphs
precision   what the numerics gate sees of each precision and of KV in fp8
narrow      8b with weights and activations of int8 and of fp8, as in stage 8b
weights     8b with weights alone of int8, as in stage 8b
kv          8b with KV in fp8, as in stage 8b

A stage writes OUT/STAGE.json after every result and ends within nine minutes: what there is no time for is
left out, and said to be. With `--reuse DIR` plans stay in that folder, 16 GB each, for the next call.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import msgspec
import numpy as np
import torch
from gpu_eager_loop import BATCH, OUTPUT_TOKENS, PROMPT_TOKENS, measure_eager_loops
from gpu_plan import (
    BLOCK_SIZE,
    DTYPES,
    LIMITS,
    SHAPES,
    LoadedPlan,
    RandomWeights,
    Shape,
    build_random_plan,
    load,
)
from gpu_steps import Sequences, decode_ms, fill, prefill_ms, run
from gpu_timing import Results
from torch import Tensor, nn

from quire.engine_core import EngineCore
from quire.execution.executor import Executor
from quire.execution.manifest import Precision, read_manifest
from quire.execution.model_inputs import ModelInputs
from quire.execution.sampler import Sampler
from quire.interface import EnginePlacement
from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig
from quire_build.decoder import Decoder
from quire_build.gate import compare, describe, gate_workload, thresholds
from quire_build.quantization import PLANS
from quire_build.torch_executor import TorchExecutor

BATCHES, CONTEXTS, PREFILLS = (1, 8, 32, 64, 128, 192, 256, 384, 512, 1024), (200, 2000), (512, 2048, 8192)
ROOM = 64
"""Tokens that a sequence may grow by while decode steps are timed."""
ROUNDING = 0.1
"""Most that a logit may differ by between two ways of one step; their standard deviation is 1.3."""
WORKLOADS = ((1024, 128, 128, 1024), (1024, 128, 128, 256), (768, 1000, 1000, 384))
"""Requests, tokens of their prompts and of their outputs, and how many may run at a time."""
SLOWEST_TOKENS_PER_S = 4500
"""Below it a workload may outlast the stage."""
PEER_FILE = Path(__file__).with_name("vllm_h200.json")
SMALL_CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "quire-small"
STAGE_S = 520
SHAPE_S = 170
"""Seconds that a plan of 8b takes to be built, made ready and measured."""
LOAD_S = 100.0
"""Seconds that a server of stage hosted may take to load."""
ALONE_S = 45.0
"""Seconds that its requests take without a server, loading included."""
KERNEL_SCRIPTS = {"gpu_sampling.py": 100, "gpu_kernels.py": 150, "gpu_linear.py": 210}
"""With the seconds that each is given; those that can are told."""
TOLD_SECONDS = ("gpu_kernels.py", "gpu_linear.py")
MARGIN_S = 20


class CheckedResults(Results):
    """Results of which some are right or wrong."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.all_right = True

    def check(self, right: bool, **row: Any) -> None:
        """Keep a row that says whether what it describes is right."""
        self.all_right &= right
        self.add(right=right, **row)


class Clock:
    """The stage's time: what would not end within it is not begun."""

    def __init__(self) -> None:
        self._end = time.monotonic() + STAGE_S

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()


class Peer:
    """vLLM's figures, and what they are worth on a GPU of another memory bandwidth."""

    def __init__(self, shape: str, bandwidth_gb_s: float) -> None:
        data = json.loads(PEER_FILE.read_text())
        self._figures = data[shape]
        self._faster = bandwidth_gb_s / data["copy_gb_s"]
        """How much more bandwidth than vLLM's GPU this one has."""

    def beside_time(self, batch: int, ours_ms: float) -> dict[str, float]:
        """vLLM's step, the ratio of ours to it, and the ratio had the bandwidths been the same."""
        theirs = self._figures["decode_ms"].get(str(batch))
        if theirs is None:
            return {}
        ratio = ours_ms / theirs
        return {
            "vllm_ms": theirs,
            "ratio": round(ratio, 3),
            "ratio_normalised": round(ratio * self._faster, 3),
        }

    def beside_rate(self, workload: str, ours: float) -> dict[str, float]:
        """vLLM's tokens per second, and ratios as above; above 1 is faster."""
        theirs = self._figures["tokens_per_s"].get(workload)
        if theirs is None:
            return {}
        ratio = ours / theirs
        return {"vllm": theirs, "ratio": round(ratio, 3), "ratio_normalised": round(ratio / self._faster, 3)}


class OnGpu(nn.Module):
    """A float32 decoder on the GPU under an executor whose step tensors are on the CPU."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self._decoder = decoder

    def forward(self, *step: Any) -> tuple[Tensor, Any, Any]:
        """As `Decoder.forward`; the pools are on the GPU already."""
        tensors = [given.cuda() if isinstance(given, Tensor) else given for given in step]
        logits, keys, values = self._decoder(*tensors)
        return logits.cpu(), keys, values


def reference(shape: Shape, dtype: torch.dtype, num_blocks: int) -> TorchExecutor:
    """The torch module in float32 on the GPU, with the very weights that a plan of `dtype` has."""
    config = shape.decoder_config
    weights = RandomWeights(config, LIMITS.max_model_len, dtype)
    with torch.device("meta"):
        decoder = Decoder(config, LIMITS.max_model_len)
    state = {name: weights.on_gpu(name).float() for name in decoder.state_dict()}
    decoder.load_state_dict(state, assign=True)
    decoder.cosine, decoder.sine = decoder.cosine.cuda(), decoder.sine.cuda()
    on_gpu = cast(Decoder, OnGpu(decoder.eval().requires_grad_(False)))
    with torch.device("cuda"):
        return TorchExecutor(on_gpu, config, num_blocks, BLOCK_SIZE)


def core_on(executor: Executor, async_scheduling: bool, max_num_seqs: int) -> EngineCore:
    """The engine as a server has it, but for Triton."""
    config = SchedulerConfig(
        num_blocks=executor.pool_info(10.0).num_blocks,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=LIMITS.max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=LIMITS.max_model_len,
        async_scheduling=async_scheduling,
    )
    return EngineCore(Scheduler(config), executor, Sampler(), step_timeout_s=60.0)


def generate(
    executor: Executor,
    prompts: list[list[int]],
    max_tokens: int,
    *,
    async_scheduling: bool = True,
    max_num_seqs: int = 256,
) -> dict[str, Any]:
    """Run requests that arrive together, greedy and past any end token; tokens by prompt, time and steps.

    Raises:
        RuntimeError: a step failed, or tokens are missing.
    """
    core = core_on(executor, async_scheduling, max_num_seqs)
    for number, prompt in enumerate(prompts):
        core.add_request(Request(str(number), prompt, SamplingParams(max_tokens=max_tokens, temperature=0)))
    tokens: list[list[int]] = [[] for _ in prompts]
    began = time.perf_counter()
    while core.has_work:
        result = core.step()
        for output in result.outputs:
            tokens[int(output.request.request_id)].append(output.token_id)
        if core.statistics.failed_steps:
            raise RuntimeError(f"a step failed: {result.failures}")
    seconds = time.perf_counter() - began
    if any(len(of_one) != max_tokens for of_one in tokens):
        raise RuntimeError("requests ended early")
    preemptions = core.scheduler.statistics.num_preemptions
    return {"tokens": tokens, "s": seconds, "steps": core.statistics.steps, "preemptions": preemptions}


def random_prompts(count: int, num_tokens: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(vocab_size, size=num_tokens).tolist() for _ in range(count)]


def plan_directory(name: str, options: argparse.Namespace, results: Results) -> Path:
    """The plan of a shape: an earlier call's, or a new one."""
    directory: Path = options.plans / name.replace(" ", "-")
    if (directory / "engine.json").is_file():
        results.add(plan=name, reused=True)
    else:
        results.add(plan=name, **build_random_plan(SHAPES[name], directory))
    return directory


# --- builder


def check_builder(results: CheckedResults, options: argparse.Namespace, clock: Clock) -> None:
    name = "2 layers of 8b"
    shape = SHAPES[name]
    directory = plan_directory(name, options, results)
    dtype = DTYPES[shape.precision]
    for attempt in (1, 2):
        with_logits = load(directory, return_logits=True, kv_cache_bytes=1 << 30)
        executor = with_logits.executor
        try:
            results.add(load=attempt, **with_logits.seconds)
            check_numerics(results, shape, dtype, with_logits)
            check_sizes(results, with_logits)
            check_memory(results, with_logits)
            check_feedback(results, executor, shape.decoder_config.vocab_size)
        finally:
            executor.close()
        torch.cuda.empty_cache()


def check_numerics(results: CheckedResults, shape: Shape, dtype: torch.dtype, loaded: LoadedPlan) -> None:
    """The gate's workload on the plan and on the torch module with the same weights."""
    config = shape.decoder_config
    workload = gate_workload(config.vocab_size, BLOCK_SIZE, LIMITS, max_logits_rows=loaded.engine.max_rows)
    torch_executor = reference(shape, dtype, workload.num_blocks)
    try:
        limits = thresholds(shape.precision, loaded.engine.manifest.kv_cache_dtype)
        report = compare(torch_executor, loaded.executor, workload, limits)
    finally:
        torch_executor.close()
    results.check(not report.exceeded, numerics=describe(report), exceeded=list(report.exceeded))


def check_sizes(results: CheckedResults, loaded: LoadedPlan) -> None:
    """Steps padded to the size that fits and to a much larger one: the same logits but for rounding."""
    engine, executor = loaded.engine, loaded.executor
    info = executor.pool_info(10.0)
    vocab_size = engine.manifest.model.vocab_size
    sequences = Sequences(64, 256, num_blocks=info.num_blocks, block_size=BLOCK_SIZE, vocab_size=vocab_size)
    fill(executor, sequences, 64, 200, LIMITS.max_num_batched_tokens)
    larger = tuple(size for size in engine.sizes if size >= 512)
    for count, num_tokens in ((1, 1), (3, 1), (8, 1), (33, 1), (64, 1), (2, 50), (7, 31)):
        step = sequences.step(range(count), 200, num_tokens)
        fitting = logits_of(executor, step)
        with patch.object(engine, "sizes", larger):
            padded = logits_of(executor, step)
        difference = float(np.abs(fitting - padded).max())
        results.check(
            difference <= ROUNDING,
            padding=[count, num_tokens],
            equal=difference == 0.0,
            largest_difference=difference,
            same_best=bool((fitting.argmax(-1) == padded.argmax(-1)).all()),
        )


def check_memory(results: CheckedResults, loaded: LoadedPlan) -> None:
    """Steps of ever other shapes take no memory of the GPU: TensorRT leaks when it is shown new ones."""
    engine, executor = loaded.engine, loaded.executor
    vocab_size = engine.manifest.model.vocab_size
    num_blocks = executor.pool_info(10.0).num_blocks
    sequences = Sequences(8, 256, num_blocks=num_blocks, block_size=BLOCK_SIZE, vocab_size=vocab_size)
    before = engine.device.memory().free
    shapes = [(count, tokens) for count in range(1, 9) for tokens in range(1, 200, 8)]
    for count, num_tokens in shapes:
        run(executor, sequences.step(range(count), 0, num_tokens))
    lost = before - engine.device.memory().free
    results.check(lost == 0, shapes=len(shapes), lost_bytes=lost)


def logits_of(executor: Executor, inputs: ModelInputs) -> Any:
    output = run(executor, inputs)
    assert output.logits is not None
    return output.logits.copy()


def check_feedback(results: CheckedResults, executor: Executor, vocab_size: int) -> None:
    """Requests with the tokens fed back on the GPU, against the same with each step's tokens known."""
    prompts = random_prompts(12, 50, vocab_size)
    fed_back = generate(executor, prompts, 24)["tokens"]
    known = generate(executor, prompts, 24, async_scheduling=False)["tokens"]
    results.check(
        fed_back == known,
        token_feedback="12 requests of 50/24",
        distinct_tokens=len({token for of_one in fed_back for token in of_one}),
    )


# --- kernels


def check_kernels(results: CheckedResults, options: argparse.Namespace, clock: Clock) -> None:
    """Each in a process of its own, so that one that hangs or fails leaves the others their time."""
    for script, seconds in KERNEL_SCRIPTS.items():
        path = Path(__file__).with_name(script)
        command = [sys.executable, str(path), "--output", str(options.out / f"{path.stem}.json")]
        if script in TOLD_SECONDS:
            command += ["--seconds", str(seconds)]
        limit_s = min(seconds + MARGIN_S, clock.left_s)
        try:
            done = subprocess.run(
                command,
                timeout=limit_s,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            results.check(done.returncode == 0, kernels=script, end=done.stdout[-2000:])
        except subprocess.TimeoutExpired as late:
            end = (late.stdout or b"")[-1000:].decode(errors="replace")
            results.add(kernels=script, stopped_after_s=round(limit_s), end=end)


# --- 8b and 7b


def check_shape(
    name: str,
    results: Results,
    options: argparse.Namespace,
    clock: Clock,
    eager_tokens_per_s: Mapping[str, float] | None = None,
    workloads: Sequence[tuple[int, int, int, int]] = WORKLOADS,
) -> None:
    directory = plan_directory(name, options, results)
    loaded = load(directory)
    results.add(load=name, kv_blocks=loaded.engine.pool_info.num_blocks, **loaded.seconds)
    peer = Peer(name.split()[0], results.bandwidth_gb_s)
    try:
        if eager_tokens_per_s:
            measure_against_eager(results, loaded, eager_tokens_per_s)
        measure_prefill(results, loaded)
        measure_decode(name, results, loaded, peer, clock)
        measure_requests(results, loaded, peer, clock, workloads)
    finally:
        loaded.executor.close()


def sequences_that_fit(loaded: LoadedPlan, most: int, num_tokens: int) -> tuple[int, Sequences]:
    manifest, num_blocks = loaded.engine.manifest, loaded.engine.pool_info.num_blocks
    count = min(most, (num_blocks - 1) // -(-num_tokens // BLOCK_SIZE))
    vocab_size = manifest.model.vocab_size
    sequences = Sequences(
        count, num_tokens, num_blocks=num_blocks, block_size=BLOCK_SIZE, vocab_size=vocab_size
    )
    return count, sequences


def measure_prefill(results: Results, loaded: LoadedPlan) -> None:
    longest = LIMITS.max_model_len
    _, sequences = sequences_that_fit(loaded, max(PREFILLS) // longest, longest)
    for num_tokens in PREFILLS:
        time_ms = prefill_ms(loaded.executor, sequences, num_tokens, longest)
        results.add(prefill=num_tokens, ms=round(time_ms, 2), tokens_per_s=round(1e3 * num_tokens / time_ms))


def measure_decode(name: str, results: Results, loaded: LoadedPlan, peer: Peer, clock: Clock) -> None:
    manifest = loaded.engine.manifest
    config = SHAPES[name].decoder_config
    weights = RandomWeights(config, 1, DTYPES[manifest.precision])
    quantization = PLANS.get(manifest.precision)
    element_bytes = 2.0 if quantization is None else 1 + 2 / quantization.group(config.hidden_size)
    weight_bytes = weights.num_read_elements * element_bytes
    token_bytes = manifest.kv_bytes_per_block // BLOCK_SIZE
    for context in CONTEXTS:
        count, sequences = sequences_that_fit(loaded, max(BATCHES), context + ROOM)
        fill(loaded.executor, sequences, count, context, LIMITS.max_num_batched_tokens)
        for batch in BATCHES:
            if batch > count or clock.left_s < 20:
                reason = "no time" if batch <= count else f"the pool holds {count} such sequences"
                results.add(decode=[batch, context], skipped=reason)
                continue
            time_ms = decode_ms(loaded.executor, sequences, batch, context)
            read = weight_bytes + batch * context * token_bytes
            beside = peer.beside_time(batch, time_ms) if context == CONTEXTS[0] else {}
            results.add(
                decode=[batch, context],
                ms=round(time_ms, 3),
                tokens_per_s=round(1e3 * batch / time_ms),
                share_of_bandwidth=results.share_of_bandwidth(read, time_ms),
                **beside,
            )


def limited_too(
    workloads: Sequence[tuple[int, int, int, int]], loaded: LoadedPlan
) -> Iterator[tuple[int, int, int, int]]:
    """The workloads, and those that preempt because the pool is small with no more running than it holds."""
    for count, prompt_tokens, output_tokens, max_num_seqs in workloads:
        yield count, prompt_tokens, output_tokens, max_num_seqs
        blocks = -(-(prompt_tokens + output_tokens) // BLOCK_SIZE)
        held = (loaded.engine.pool_info.num_blocks - 1) // blocks
        if held < min(max_num_seqs, count):
            yield count, prompt_tokens, output_tokens, held


def measure_requests(
    results: Results,
    loaded: LoadedPlan,
    peer: Peer,
    clock: Clock,
    workloads: Sequence[tuple[int, int, int, int]],
) -> None:
    vocab_size = loaded.engine.manifest.model.vocab_size
    generate(loaded.executor, random_prompts(64, 128, vocab_size, seed=1), 8)
    for count, prompt_tokens, output_tokens, max_num_seqs in limited_too(workloads, loaded):
        workload = f"{count} x {prompt_tokens}/{output_tokens}"
        needed_s = count * output_tokens / SLOWEST_TOKENS_PER_S
        if clock.left_s < needed_s:
            results.add(requests=workload, skipped=f"no time: {round(needed_s)} s may be needed")
            continue
        prompts = random_prompts(count, prompt_tokens, vocab_size)
        done = generate(loaded.executor, prompts, output_tokens, max_num_seqs=max_num_seqs)
        rate = count * output_tokens / done["s"]
        results.add(
            requests=workload,
            max_num_seqs=max_num_seqs,
            tokens_per_s=round(rate),
            s=round(done["s"], 2),
            steps=done["steps"],
            preemptions=done["preemptions"],
            **peer.beside_rate(workload, rate),
        )


def check_8b(results: CheckedResults, options: argparse.Namespace, clock: Clock) -> None:
    check_shape("8b", results, options, clock)


def check_7b(results: CheckedResults, options: argparse.Namespace, clock: Clock) -> None:
    """With the loop that users have before they serve: everything eager, batch by batch."""
    eager = measure_eager_loops(results, SHAPES["7b"].config)
    check_shape("7b", results, options, clock, eager)


def measure_against_eager(results: Results, loaded: LoadedPlan, eager: Mapping[str, float]) -> None:
    """The eager loops' batch through the whole engine, and so many requests that it can fill itself."""
    vocab_size = loaded.engine.manifest.model.vocab_size
    for count in (BATCH, 32 * BATCH):
        prompts = random_prompts(count, PROMPT_TOKENS, vocab_size, seed=2)
        rate = count * OUTPUT_TOKENS / generate(loaded.executor, prompts, OUTPUT_TOKENS)["s"]
        results.add(
            requests=f"{count} x {PROMPT_TOKENS}/{OUTPUT_TOKENS}",
            tokens_per_s=round(rate),
            times_eager={loop: round(rate / theirs, 2) for loop, theirs in eager.items()},
        )


# --- hosted and precision


def check_hosted(results: CheckedResults, options: argparse.Namespace, clock: Clock) -> None:
    from gpu_serving import random_repository, serve_and_measure, without_graphs  # needs a client of Triton
    from serving import ServerNotReadyError

    def serve(name: str, repository: Path) -> bool:
        """Whether it got ready; why not is in the results, and more of it in the server's log."""
        log = options.out / f"hosted-{name.replace(' ', '-')}.log"
        limit_s = min(LOAD_S, clock.left_s)
        try:
            for row in serve_and_measure(repository, log, options.streams, 10, limit_s):
                results.add(serving=name, **row)
        except ServerNotReadyError as error:
            results.check(False, serving=name, not_ready=str(error), log=log.name)
            return False
        return True

    for placement in (EnginePlacement.HOSTED, EnginePlacement.IN_PROCESS):
        repository = options.plans / f"hosted-{options.shape}-{placement}".replace(" ", "-")
        seconds = random_repository(SHAPES[options.shape], repository, placement)
        results.add(repository=placement, shape=options.shape, **seconds)
        if not serve(placement, repository) and placement is EnginePlacement.HOSTED:
            with without_graphs(repository):
                serve("hosted without graphs", repository)
        if clock.left_s > ALONE_S:
            measure_alone(results, repository / placement.engine_owner / "1")


def measure_alone(results: Results, plan: Path) -> None:
    """The requests that arrive together at a server, given to the engine without one."""
    from gpu_serving import OUTPUT_TOKENS, PROMPT_TOKENS, TOGETHER

    loaded = load(plan)
    try:
        vocab_size = loaded.engine.manifest.model.vocab_size
        generate(loaded.executor, random_prompts(64, PROMPT_TOKENS, vocab_size, seed=1), 8)
        prompts = random_prompts(TOGETHER, PROMPT_TOKENS, vocab_size)
        done = generate(loaded.executor, prompts, OUTPUT_TOKENS, max_num_seqs=LIMITS.max_num_seqs)
    finally:
        loaded.executor.close()
    results.add(
        requests=f"{TOGETHER} x {PROMPT_TOKENS}/{OUTPUT_TOKENS}",
        without="a server",
        tokens_per_s=round(TOGETHER * OUTPUT_TOKENS / done["s"]),
        s=round(done["s"], 2),
    )


def check_precision(results: CheckedResults, options: argparse.Namespace, clock: Clock) -> None:
    """The project's own checkpoint through the whole build, then two layers of 8b's shape against float32."""
    from quire_build.pipeline import KvCacheChoice, build  # needs tritonclient

    precisions: tuple[Precision, ...] = ("bf16", "fp16", *PLANS)
    variants: list[tuple[Precision, KvCacheChoice]] = [(name, "auto") for name in precisions]
    for precision, kv_cache_dtype in [*variants, ("bf16", "fp8")]:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "repository"
            build(
                SMALL_CHECKPOINT,
                output,
                runtime="tensorrt",
                precision=precision,
                kv_cache_dtype=kv_cache_dtype,
                engine=EnginePlacement.IN_PROCESS,
                gate_text=SMALL_CHECKPOINT / "held-out.txt",
                accept_numerics=True,
                progress=lambda line: print(line, flush=True),
            )
            gate = read_manifest(output / EnginePlacement.IN_PROCESS.engine_owner / "1").gate
        results.add(
            gate=SMALL_CHECKPOINT.name,
            precision=precision,
            kv_cache_dtype=kv_cache_dtype,
            **msgspec.to_builtins(gate),
        )
    shape = SHAPES["2 layers of 8b"]
    for precision in precisions[:2]:  # eight bits want another reference
        if clock.left_s < 90:
            results.add(gate="2 layers of 8b", precision=precision, skipped="no time")
            continue
        with tempfile.TemporaryDirectory() as folder:
            build_random_plan(shape, Path(folder), precision=precision)
            loaded = load(Path(folder), return_logits=True, kv_cache_bytes=1 << 30)
            try:
                check_numerics(results, Shape(shape.config, precision), DTYPES[precision], loaded)
            finally:
                loaded.executor.close()


def check_narrow(results: CheckedResults, options: argparse.Namespace, clock: Clock) -> None:
    """8b with weights and activations of eight bits."""
    for name in ("8b int8", "8b fp8"):
        if clock.left_s < SHAPE_S:
            results.add(shape=name, skipped="no time")
            continue
        check_shape(name, results, options, clock, workloads=WORKLOADS[:1])


def check_weights(results: CheckedResults, options: argparse.Namespace, clock: Clock) -> None:
    """8b with weights of eight bits and activations of bf16."""
    check_shape("8b int8-weights", results, options, clock, workloads=WORKLOADS[:1])


def check_kv(results: CheckedResults, options: argparse.Namespace, clock: Clock) -> None:
    """8b over a pool of fp8, with the requests that read most of it."""
    check_shape("8b KV fp8", results, options, clock, workloads=WORKLOADS[2:])


STAGES: dict[str, Callable[[CheckedResults, argparse.Namespace, Clock], None]] = {
    "builder": check_builder,
    "kernels": check_kernels,
    "8b": check_8b,
    "7b": check_7b,
    "hosted": check_hosted,
    "precision": check_precision,
    "narrow": check_narrow,
    "weights": check_weights,
    "kv": check_kv,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--reuse", type=Path, help="folder that keeps plans between calls")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="of stage hosted")
    parser.add_argument("--streams", type=int, nargs="+", default=(1, 32, 256), help="of stage hosted")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        options.plans = options.reuse or Path(folder)
        results = CheckedResults(options.out / f"{options.stage}.json")
        STAGES[options.stage](results, options, clock)
    if not results.all_right:
        sys.exit("something is not right: see the rows with right: false")


if __name__ == "__main__":
    main()
