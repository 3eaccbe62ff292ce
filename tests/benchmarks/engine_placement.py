"""What a turn of the step loop costs with a hosted engine, over one in the scheduler's process.

    python tests/benchmarks/engine_placement.py REPOSITORY

Starts a tritonserver with the hosted engine of a repository and, in the scheduler's place, this file as the
model `probe`. It drives an engine core on the hosted engine and one on the same engine loaded in its own
process, plainly and overlapped, in blocks of a few turns that alternate, so that whatever else the machine
does meets all of them. Every running request decodes; frontends and clients have no part in it. Prints JSON:
of the blocks' median turns the median (`turn_ms`) and the lowest (`quietest_turn_ms`), and the median over
the rounds of ratios to `in_process`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient, InferInput

from quire.engine_core import EngineCore
from quire.execution.executor import Executor
from quire.execution.manifest import Manifest, read_manifest
from quire.execution.sampler import Sampler
from quire.interface import ENGINE, SCHEDULER, EnginePlacement
from quire.launcher.plan import Endpoints, LaunchOptions, check_repository, plan_launch
from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig
from quire.settings import ServingSettings

BATCH_SIZES = (1, 8, 32, 128, 256)
PROMPT_TOKENS = 16
TURNS_PER_BLOCK = 20
KV_CACHE_BYTES = 512 << 20
LOAD_TIMEOUT_S = 120
STEP_TIMEOUT_S = 60
PROBE_CONFIG = """
name: "probe"
backend: "python"
input { name: "batch_sizes" data_type: TYPE_INT32 dims: -1 }
input { name: "rounds" data_type: TYPE_INT32 dims: 1 }
output { name: "figures" data_type: TYPE_STRING dims: 1 }
instance_group { count: 1 kind: KIND_CPU }
"""

Figures = list[dict[str, Any]]


class TritonPythonModel:
    """The model `probe`, in a stub of the server."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engine a second time, in this process."""
        from quire.execution.openvino import OpenVINOExecutor
        from quire.serving.component import join_server
        from quire.serving.engine.loading import load_engine

        engine_dir = Path(args["model_repository"]).parent / ENGINE / "1"
        self._manifest = read_manifest(engine_dir)
        self._settings = ServingSettings.read({}, os.environ).within(self._manifest.limits)
        self._rendezvous = join_server()
        self._in_process = OpenVINOExecutor(load_engine(engine_dir, self._settings))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Measure what each request asks for."""
        from quire.serving.scheduler.triton_executor import TritonExecutor
        from quire.serving.tensors import input_arrays, response, string_array

        hosted = TritonExecutor(self._rendezvous)
        contenders: dict[str, tuple[Executor, bool]] = {
            "hosted": (hosted, False),
            "in_process": (self._in_process, False),
            "in_process_overlapped": (self._in_process, True),
        }
        answers = []
        for request in requests:
            arrays = input_arrays(request)
            rounds = int(arrays["rounds"][0])
            figures = [
                measure(contenders, self._manifest, self._settings, int(batch_size), rounds)
                for batch_size in arrays["batch_sizes"]
            ]
            answers.append(response({"figures": string_array(json.dumps(figures))}))
        hosted.close()
        return answers

    def finalize(self) -> None:
        """Let go of the server."""
        self._rendezvous.close()


def measure(
    contenders: Mapping[str, tuple[Executor, bool]],
    manifest: Manifest,
    settings: ServingSettings,
    batch_size: int,
    rounds: int,
) -> dict[str, Any]:
    """Median turns of every contender (an executor, and whether to overlap), in blocks that alternate."""
    turns: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            executor, overlap = contenders[name]
            pool = executor.pool_info(LOAD_TIMEOUT_S)
            config = SchedulerConfig(
                num_blocks=pool.num_blocks,
                block_size=manifest.block_size,
                max_num_batched_tokens=settings.max_num_batched_tokens,
                max_num_seqs=settings.max_num_seqs,
                max_model_len=settings.max_model_len,
                async_scheduling=overlap,
            )
            core = EngineCore(Scheduler(config), executor, Sampler(), step_timeout_s=STEP_TIMEOUT_S)
            turns[name].append(median_turn_ms(core, batch_size, manifest.model.vocab_size))
    return {
        "batch_size": batch_size,
        "turn_ms": {name: round(statistics.median(times), 3) for name, times in turns.items()},
        "quietest_turn_ms": {name: round(min(times), 3) for name, times in turns.items()},
        "over_in_process": {
            name: round(
                statistics.median(one / two for one, two in zip(times, turns["in_process"], strict=True)), 3
            )
            for name, times in turns.items()
        },
    }


def median_turn_ms(core: EngineCore, batch_size: int, vocab_size: int) -> float:
    """One block: requests arrive, are computed until all of them decode, decode for a while, and go."""
    rng = np.random.default_rng(batch_size)
    for number in range(batch_size):
        prompt = rng.integers(vocab_size, size=PROMPT_TOKENS).tolist()
        sampling = SamplingParams(max_tokens=10 * TURNS_PER_BLOCK, temperature=0.0)
        core.add_request(Request(str(number), prompt, sampling))
    while core.scheduler.num_waiting or core.statistics.sampled_tokens < 2 * batch_size:
        core.step()
    times = []
    for _ in range(TURNS_PER_BLOCK):
        began = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - began)
    core.abort_requests(map(str, range(batch_size)))
    while core.has_work:
        core.step()
    return statistics.median(times) * 1e3


@contextlib.contextmanager
def probe_repository(repository: Path) -> Iterator[Path]:
    """The repository's engine, and this file as a model beside it."""
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        (models / ENGINE).symlink_to(repository.resolve() / ENGINE)
        version = models / "probe" / "1"
        version.mkdir(parents=True)
        (models / "probe" / "config.pbtxt").write_text(PROBE_CONFIG)
        (version / "model.py").write_bytes(Path(__file__).read_bytes())
        yield models


def free_endpoints() -> Endpoints:
    """Three ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for unbound in sockets:
            unbound.bind(("127.0.0.1", 0))
        return Endpoints("127.0.0.1", *(bound.getsockname()[1] for bound in sockets))


@contextlib.contextmanager
def probe_server(repository: Path) -> Iterator[str]:
    """A server with engine and probe while the block runs; its gRPC address."""
    plan = plan_launch(LaunchOptions(repository, free_endpoints(), {"kv_cache_bytes": KV_CACHE_BYTES}))
    url = plan.endpoints.local_url(plan.endpoints.grpc_port)
    with probe_repository(repository) as models:
        argv = [
            f"--model-repository={models}" if argument.startswith("--model-repository=") else argument
            for argument in (*plan.argv, "--log-info=false")
        ]
        server = subprocess.Popen(argv, env={**os.environ, **plan.environment}, stdout=sys.stderr)
        try:
            deadline = time.monotonic() + LOAD_TIMEOUT_S
            with InferenceServerClient(url) as client:
                while not is_ready(client):
                    if server.poll() is not None or time.monotonic() > deadline:
                        sys.exit("the server did not get ready")
                    time.sleep(0.1)
            yield url
        finally:
            server.terminate()
            server.wait()


def is_ready(client: InferenceServerClient) -> bool:
    """Whether all models are loaded; a server that does not listen yet is not ready."""
    try:
        return bool(client.is_server_ready())
    except Exception:
        return False


def ask_probe(url: str, batch_sizes: Sequence[int], rounds: int) -> Figures:
    """Have the probe measure."""
    inputs = []
    for name, values in (("batch_sizes", batch_sizes), ("rounds", [rounds])):
        tensor = InferInput(name, [len(values)], "INT32")
        tensor.set_data_from_numpy(np.array(values, np.int32))
        inputs.append(tensor)
    with InferenceServerClient(url) as client:
        figures: Figures = json.loads(client.infer("probe", inputs).as_numpy("figures")[0])
    return figures


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES)
    parser.add_argument("--rounds", type=int, default=15, help="blocks of each engine at each batch size")
    options = parser.parse_args()
    # Not to be found from inside the server, where this file is a model.
    from machine import machine

    if check_repository(options.repository).engine is not EnginePlacement.HOSTED:
        parser.error(f"the engine of {options.repository} runs in the process of the model {SCHEDULER}")
    with probe_server(options.repository) as url:
        figures = ask_probe(url, options.batch_sizes, options.rounds)
    print(json.dumps({"machine": machine(), "figures": figures}, indent=2))


if __name__ == "__main__":
    main()
