"""Sampling as a plan does it, in the Triton language's interpreter, against `Sampler`."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by its own library functions too
pytest.importorskip("triton")

from quire.execution.engine_state import SAMPLED_IDS_BYTE, STEP_MARK, STEP_SIZE_BYTE, engine_state_elements
from quire.execution.sampler import Sampler
from quire_build.tensorrt.operators.launch import PlainArithmetic
from quire_build.tensorrt.operators.sample import Sample

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

Floats = NDArray[np.float32]

SMALL: dict[str, Any] = {"BLOCK": 256, "CAPACITY": 128}
"""Sizes with which a vocabulary of a thousand takes every path that a hundred thousand takes on a GPU."""
CLOSE = 1e-6
"""Share of the mass by which the reference's cumulative sums and the kernel's may differ."""
ALMOST_ONE = 1 - 2.0**-24
UNTOUCHED = -99


def run(
    logits: Floats,
    sampling: Floats,
    max_num_seqs: int = 64,
    splits: int | None = None,
    noted: tuple[int, int] = (0, 0),
    **constants: Any,
) -> NDArray[np.int32]:
    """Sample once; checks what a launch leaves in engine_state.

    `noted` is the mark and how many rows are no padding.
    """
    rows, vocab_size = logits.shape
    operator = Sample(vocab_size=vocab_size, max_num_seqs=max_num_seqs)
    shapes = [logits.shape, sampling.shape, (1,)]
    launch = operator.launch(shapes, PlainArithmetic())
    state = torch.zeros(engine_state_elements(max_num_seqs), dtype=torch.int64)
    state[0] = 123
    # So many tokens do not matter.
    sizes = state[STEP_SIZE_BYTE // 8 :][:2]
    sizes[0], sizes[1] = STEP_MARK << 32, noted[0] << 32 | noted[1]
    table = state.view(torch.int32)[SAMPLED_IDS_BYTE // 4 :]
    table.fill_(-7)
    ids, scratch = (
        torch.full(shape, UNTOUCHED, dtype=torch.int32)
        for shape, element in operator.outputs(shapes)
        if element
    )
    (chosen_splits,) = launch.integers if splits is None else (splits,)
    assert launch.grid == (*launch.integers, rows)
    launch.kernel[(chosen_splits, rows)](
        torch.from_numpy(logits), torch.from_numpy(sampling), state, chosen_splits, ids, scratch,
        **{**launch.constants, **constants},
    )  # fmt: skip
    used = min(noted[1], rows) if noted[0] == STEP_MARK else rows
    assert (ids[used:] == UNTOUCHED).all() and (scratch[used:] == UNTOUCHED).all()
    kept = min(used, max_num_seqs)
    assert torch.equal(table[:kept], ids[:kept])
    assert (table[kept:] == -7).all()
    assert state[0] == 123
    assert sizes.tolist() == [STEP_MARK << 32, noted[0] << 32 | noted[1]]
    sizes[:] = 0
    assert not state.view(torch.int32)[2 : SAMPLED_IDS_BYTE // 4].any(), "a counter was left behind"
    return ids.numpy()


def bounds(logits: Floats, sampling: Floats, token: int) -> tuple[float, float, float]:
    """Where the draw aims, and where a token begins and ends, as shares of the mass that is kept."""
    inverse, top_k, top_p, min_p, uniform = (float(x) for x in sampling)
    order = np.lexsort((np.arange(len(logits)), -logits))
    distance = ((logits[order[0]] - logits[order]) * np.float32(inverse)).astype(np.float64)
    weights = np.exp(-distance)
    kept = len(weights)
    if min_p > 0:
        kept = int((weights.astype(np.float32) >= np.float32(min_p)).sum())
    if top_k > 0:
        kept = min(kept, int(top_k))
    cumulative = np.cumsum(weights)
    if top_p < 1:
        kept = min(kept, 1 + int((cumulative < top_p * cumulative[kept - 1]).sum()))
    mass = cumulative[kept - 1]
    rank = int(np.flatnonzero(order == token)[0])
    return uniform, (cumulative[rank] - weights[rank]) / mass, cumulative[rank] / mass


def check(logits: Floats, sampling: Floats, **constants: Any) -> NDArray[np.int32]:
    """The same tokens as `Sampler`'s, but where the draw falls on the border of two."""
    got = run(logits, sampling, **constants)
    expected = Sampler().sample_packed(logits, sampling)
    for row in np.flatnonzero(got != expected):
        point, begin, end = bounds(logits[row], sampling[row], int(got[row]))
        assert begin - CLOSE <= point <= end + CLOSE, (row, got[row], expected[row], sampling[row])
    assert (got != expected).sum() <= len(got) // 10
    return got


def rows_of(rng: np.random.Generator, rows: int, vocab_size: int, spread: float) -> Floats:
    logits: Floats = (rng.standard_normal((rows, vocab_size)) * spread).astype(np.float32)
    return logits


FILTERS = list(itertools.product((0, 1, 40, 300, 5000), (1.0, 0.9, 0.0), (0.0, 0.02, 1.0)))


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_every_combination_of_filters(spread: float) -> None:
    rng = np.random.default_rng(int(10 * spread))
    logits = rows_of(rng, len(FILTERS), 1000, spread)
    sampling = np.empty((len(FILTERS), 5), dtype=np.float32)
    sampling[:, 0] = rng.choice([0.5, 1.0, 1.7], len(FILTERS))
    sampling[:, 1:4] = FILTERS
    sampling[:, 4] = rng.random(len(FILTERS), dtype=np.float32)
    check(logits, sampling, **SMALL)


@pytest.mark.parametrize("uniform", [0.0, 0.37, ALMOST_ONE])
def test_ties_and_excluded_tokens(uniform: float) -> None:
    rng = np.random.default_rng(5)
    logits = np.round(rows_of(rng, 12, 1000, 1.0))
    logits[3:6, 100:] = -np.inf
    logits[6] = 2.5  # all equal
    logits[7, 1:] = -np.inf
    logits[8, ::2] = -np.inf
    logits[9] = -1e30
    logits[9, 77] = 3e38  # all differences overflow
    sampling = np.tile(np.array([1.0, 0, 1.0, 0, uniform], dtype=np.float32), (12, 1))
    sampling[1::4, 1] = 150
    sampling[2::4, 2] = 0.8
    sampling[3::4, 3] = 0.1
    check(logits, sampling, **SMALL)


def test_equal_candidates_are_drawn_by_id() -> None:
    logits = np.zeros((8, 1000), dtype=np.float32)
    logits[:, 400:] = -1.0
    sampling = np.zeros((8, 5), dtype=np.float32)
    sampling[:, 0] = sampling[:, 2] = 1.0
    sampling[:, 1] = 301
    sampling[:, 4] = (np.arange(8) * 40 + 20.5) / 301
    got = run(logits, sampling, **SMALL)
    np.testing.assert_array_equal(got, np.arange(8) * 40 + 20)
    np.testing.assert_array_equal(got, Sampler().sample_packed(logits, sampling))


def test_a_large_vocabulary() -> None:
    rng = np.random.default_rng(6)
    logits = np.concatenate([rows_of(rng, 3, 32001, spread) for spread in (0.5, 2.0, 6.0)])
    sampling = np.tile(np.array([1.0, 0, 1.0, 0, 0], dtype=np.float32), (9, 1))
    sampling[1::3, 1:3] = 50, 0.9
    sampling[2::3, 2] = 0.95
    sampling[:, 4] = rng.random(9, dtype=np.float32)
    check(logits, sampling)


def test_temperatures_from_cold_to_hot() -> None:
    rng = np.random.default_rng(7)
    logits = rows_of(rng, 10, 1000, 2.0)
    sampling = np.tile(np.array([1.0, 0, 0.95, 0, 0], dtype=np.float32), (10, 1))
    sampling[:, 0] = np.geomspace(1e-2, 1e5, 10)
    sampling[:, 4] = rng.random(10, dtype=np.float32)
    check(logits, sampling, **SMALL)


@pytest.mark.parametrize("rows", [1, 3, 130])
def test_greedy_takes_the_first_of_the_best(rows: int) -> None:
    rng = np.random.default_rng(rows)
    logits = np.round(rows_of(rng, rows, 1000, 1.0))
    sampling = np.zeros((rows, 5), dtype=np.float32)
    got = run(logits, sampling, **SMALL)
    np.testing.assert_array_equal(got, logits.argmax(axis=1))
    np.testing.assert_array_equal(got, Sampler().sample_packed(logits, sampling))


@pytest.mark.parametrize("inverse_temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_give_minus_one(inverse_temperature: float) -> None:
    rng = np.random.default_rng(9)
    logits = rows_of(rng, 6, 1000, 1.0)
    logits[0, 999] = np.nan
    logits[1, 0] = np.nan
    logits[2, 500] = np.inf
    logits[3] = -np.inf
    logits[4, 3:] = -np.inf
    logits[4, 2] = -np.nan
    sampling = np.tile(np.array([inverse_temperature, 0, 1.0, 0, 0.5], dtype=np.float32), (6, 1))
    got = run(logits, sampling, **SMALL)
    assert got[:5].tolist() == [-1] * 5
    assert got[5] >= 0


def test_a_row_depends_on_itself_alone() -> None:
    rng = np.random.default_rng(10)
    logits = rows_of(rng, 3, 1000, 1.0)
    sampling = np.tile(np.array([1.0, 0, 0.99, 0, 0], dtype=np.float32), (3, 1))
    sampling[:, 4] = rng.random(3, dtype=np.float32)
    together = run(logits, sampling, **SMALL)
    for row in range(3):
        one = slice(row, row + 1)
        assert run(logits[one], sampling[one], **SMALL)[0] == together[row]
    for splits in (1, 3):
        np.testing.assert_array_equal(run(logits, sampling, splits=splits, **SMALL), together)


@pytest.mark.parametrize("used", [0, 1, 4, 6, 100])
@pytest.mark.parametrize("splits", [1, 3])
def test_rows_of_padding_are_left_alone(used: int, splits: int) -> None:
    """Whatever they hold; `run` checks that nothing of theirs is written."""
    rng = np.random.default_rng(13)
    logits = rows_of(rng, 6, 1000, 1.0)
    logits[used:] = np.nan
    sampling = np.tile(np.array([1.0, 0, 0.99, 0, 0.3], dtype=np.float32), (6, 1))
    got = run(logits, sampling, splits=splits, noted=(STEP_MARK, used), **SMALL)
    alone = run(logits[:used], sampling[:used], splits=splits, **SMALL) if used else got[:0]
    np.testing.assert_array_equal(got[:used], alone)


@pytest.mark.parametrize("mark", [0, STEP_MARK - 1, STEP_MARK + 1, -1])
def test_without_the_mark_no_row_is_padding(mark: int) -> None:
    logits = rows_of(np.random.default_rng(14), 6, 300, 1.0)
    got = run(logits, np.zeros((6, 5), dtype=np.float32), noted=(mark, 2), BLOCK=128)
    np.testing.assert_array_equal(got, logits.argmax(axis=1))


def test_the_table_takes_no_more_rows_than_it_has() -> None:
    logits = rows_of(np.random.default_rng(12), 6, 300, 1.0)
    got = run(logits, np.zeros((6, 5), dtype=np.float32), max_num_seqs=4, BLOCK=128)
    np.testing.assert_array_equal(got, logits.argmax(axis=1))


def test_zeros_of_both_signs_are_equally_likely() -> None:
    logits = np.zeros((2, 300), dtype=np.float32)
    logits[:, ::2] = -0.0
    sampling = np.array([[1, 0, 1, 0, 0.9], [1, 1, 1, 0, 0.5]], dtype=np.float32)
    np.testing.assert_array_equal(
        run(logits, sampling, BLOCK=128, CAPACITY=128), Sampler().sample_packed(logits, sampling)
    )


def test_garbage_parameters_still_give_a_token() -> None:
    rng = np.random.default_rng(11)
    garbage = [np.nan, -1.0, np.inf, -np.inf, 3e38, 1e-45, 0.5]
    sampling = np.array([rng.choice(garbage, 5) for _ in range(40)], dtype=np.float32)
    sampling[:7, 0] = garbage
    got = run(rows_of(rng, 40, 300, 1.0), sampling, BLOCK=128, CAPACITY=128)
    assert ((got >= 0) & (got < 300)).all()


PTX_SCRIPT = """
from quire_build.tensorrt.kernels.compiled import compile_kernel
from quire_build.tensorrt.operators.launch import PlainArithmetic
from quire_build.tensorrt.operators.sample import Sample

for arch, vocab_size in ((80, 128256), (89, 32001), (90, 128256)):
    operator = Sample(vocab_size=vocab_size, max_num_seqs=256)
    launch = operator.launch([(4, vocab_size), (4, 5), (1,)], PlainArithmetic())
    compiled = compile_kernel(
        launch.kernel, launch.types, launch.constants,
        arch=arch, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )
    print(arch, compiled.name, compiled.threads, compiled.shared_bytes)
"""


def test_the_kernel_compiles_for_ampere_ada_and_hopper(tmp_path: object) -> None:
    """In a process of its own: the compiler must not see this process's interpreter switch or cache."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PTX_SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
