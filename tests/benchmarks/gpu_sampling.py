"""Times of sampling on a GPU by itself, launched as a plan launches it, beside torch.argmax.

    PYTHONPATH=backends:build python tests/benchmarks/gpu_sampling.py --output OUT.json

One row for each batch, vocabulary, spread of the random logits and way of sampling: microseconds of one
launch, from CUDA graphs of several launches, each on logits of its own. Then rows drawn are compared with
`Sampler`'s.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import torch
from gpu_timing import Results, graph_time_ms
from torch import Tensor

from quire.execution.engine_state import COUNTERS_BYTE, NUM_COUNTERS, engine_state_elements
from quire.execution.sampler import Sampler
from quire_build.tensorrt.operators.launch import PlainArithmetic
from quire_build.tensorrt.operators.sample import Sample

BATCHES = (1, 8, 32, 64, 256)
VOCAB_SIZES = (128256, 32000)
SPREADS = (1.0, 4.0)
"""Standard deviations of the logits: with 1 the mass is spread over most of the vocabulary."""
WAYS = {
    "greedy": (0.0, 0.0, 1.0, 0.0),
    "temperature": (1.0, 0.0, 1.0, 0.0),
    "top_k 50, top_p 0.9": (1.0, 50.0, 0.9, 0.0),
    "top_p 0.9": (1.0, 0.0, 0.9, 0.0),
}
"""Inverse temperature, top_k, top_p, min_p."""
LAUNCHES = 8
CHECKED_ROWS = 64


class Prepared:
    """`Sample` with its outputs allocated, ready to be launched again and again."""

    def __init__(self, logits: Tensor, sampling: Tensor) -> None:
        rows, vocab_size = logits.shape
        operator = Sample(vocab_size=vocab_size, max_num_seqs=rows)
        shapes = [tuple(logits.shape), tuple(sampling.shape), (1,)]
        self.state = torch.zeros(engine_state_elements(rows), dtype=torch.int64, device="cuda")
        self.ids, self._scratch = (
            torch.empty(shape, dtype=torch.int32, device="cuda") for shape, _ in operator.outputs(shapes)
        )
        self._inputs, self._launch = (
            (logits, sampling, self.state),
            operator.launch(shapes, PlainArithmetic()),
        )

    def __call__(self) -> None:
        """Launch it on the current stream."""
        launch = self._launch
        launch.kernel[launch.grid](
            **launch.arguments(self._inputs, (self.ids, self._scratch)),
            **launch.constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )


def parameters(way: tuple[float, ...], rows: int) -> Tensor:
    """Sampling parameters [rows, 5] with uniform numbers drawn at random."""
    sampling = torch.tensor((*way, 0.0), device="cuda").repeat(rows, 1)
    sampling[:, 4] = torch.rand(rows, device="cuda")
    return sampling


def measure(results: Results, rows: int, vocab_size: int, spread: float) -> None:
    """All ways on one batch."""
    batches = [torch.randn(rows, vocab_size, device="cuda") * spread for _ in range(LAUNCHES)]
    times = {}
    for name, way in WAYS.items():
        launches = [Prepared(logits, parameters(way, rows)) for logits in batches]
        time_ms = graph_time_ms(lambda _, launches=launches: [launch() for launch in launches])  # type: ignore[misc]
        times[name] = round(1000 * time_ms / LAUNCHES, 1)
    argmax_ms = graph_time_ms(lambda _: [logits.argmax(1) for logits in batches])
    results.add(
        batch=rows,
        vocab_size=vocab_size,
        spread=spread,
        microseconds=times,
        argmax_microseconds=round(1000 * argmax_ms / LAUNCHES, 1),
    )


def compare(results: Results, name: str, vocab_size: int, spread: float) -> None:
    """How many of CHECKED_ROWS rows `Sampler` draws the same token for."""
    logits = torch.randn(CHECKED_ROWS, vocab_size, device="cuda") * spread
    sampling = parameters(WAYS[name], CHECKED_ROWS)
    launch = Prepared(logits, sampling)
    launch()
    chosen = launch.ids.cpu().numpy()
    counters = launch.state.view(torch.int32)[COUNTERS_BYTE // 4 :][:NUM_COUNTERS]
    expected = Sampler().sample_packed(logits.cpu().numpy(), sampling.cpu().numpy())
    results.add(
        way=name,
        vocab_size=vocab_size,
        spread=spread,
        rows=CHECKED_ROWS,
        same=int((chosen == expected).sum()),
        counters_left=int(counters.count_nonzero()),
    )


def main() -> None:
    """Measure and compare everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    results = Results(parser.parse_args().output)
    torch.manual_seed(1)
    for vocab_size, spread in itertools.product(VOCAB_SIZES, SPREADS):
        for name in WAYS:
            compare(results, name, vocab_size, spread)
    for vocab_size, spread, rows in itertools.product(VOCAB_SIZES, SPREADS, BATCHES):
        measure(results, rows, vocab_size, spread)


if __name__ == "__main__":
    main()
