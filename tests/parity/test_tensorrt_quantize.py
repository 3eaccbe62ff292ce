"""The quantising operator against `quire_build.quantization`, in the language's interpreter; its PTX."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by its own library functions too
pytest.importorskip("triton")

from tests.parity.test_tensorrt_linear import note

from quire.execution.engine_state import engine_state_elements
from quire_build.quantization import LARGEST, PLANS, NarrowType, rotated
from quire_build.tensorrt.kernels.quantize import CHUNK
from quire_build.tensorrt.operators import PlainArithmetic, Quantize
from quire_build.tensorrt.operators.quantize import LARGEST_PIECE

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def operator(k: int, narrow: NarrowType, of_logits: int = 0) -> Quantize:
    return Quantize(
        k=k, rotation=PLANS[narrow].rotation(k), to_float=int(narrow == "fp8"), of_logits=of_logits
    )


def launched(
    layer: Quantize, x: torch.Tensor, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers, float32, and scales; -7 words and NaN where nothing was written."""
    if state is None:
        state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    shapes = [tuple(x.shape), tuple(state.shape)]
    (words, _), (rows, _) = layer.outputs(shapes)
    numbers = torch.full(words, -7, dtype=torch.int32)
    scales = torch.full(rows, math.nan)
    launch = layer.launch(shapes, PlainArithmetic())
    launch.kernel[launch.grid](**launch.arguments((x, state), (numbers, scales)), **launch.constants)
    return numbers.view(DTYPES["fp8" if layer.to_float else "int8"]).float(), scales


@pytest.mark.parametrize("narrow", DTYPES)
@pytest.mark.parametrize("k", [4, 60, 96, 256, 320, 4096, 11008, LARGEST_PIECE + 256])
def test_rows_are_quantised_as_the_decoder_says(k: int, narrow: NarrowType) -> None:
    """From one input to more than a program keeps, in rotations of all sizes."""
    layer = operator(k, narrow)
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(3, k, generator=generator) * torch.tensor([1e-3, 1.0, 50.0])[:, None]
    x[:, 1] *= 30.0
    numbers, scales = launched(layer, x)
    wanted = rotated(x, layer.rotation)
    torch.testing.assert_close(scales, wanted.abs().amax(1) / LARGEST[narrow], rtol=1e-5, atol=0)
    assert torch.equal(numbers.abs().amax(1), torch.full((3,), LARGEST[narrow]))
    expected = PLANS[narrow].input(x)
    actual = rotated(numbers * scales[:, None], layer.rotation)
    assert float((actual - expected).norm() / expected.norm()) < 2e-3
    distance = (numbers - wanted / scales[:, None]).abs()
    nearest = torch.full_like(distance, 0.5) if narrow == "int8" else 2**-4 * numbers.abs() + 2**-10
    assert bool((distance <= 1.001 * nearest).all())


def test_a_large_input_takes_little_from_the_others() -> None:
    x = torch.full((1, 256), 0.01)
    x[0, 3] = 50.0
    numbers, scales = launched(operator(256, "int8"), x)
    assert int((numbers == 0).sum()) < 10
    back = rotated(numbers * scales[:, None], 256)
    # By itself it would leave nothing of them: a step is 50 / 127.
    assert float((back - x).abs().max()) < 50 / 127 / 2


@pytest.mark.parametrize("narrow", DTYPES)
def test_zeros_are_zeros_and_large_numbers_no_infinities(narrow: NarrowType) -> None:
    x = torch.zeros(4, 128)
    x[1, 5], x[2] = 1e30, -3e35
    x[3] = 1e-38
    numbers, scales = launched(operator(128, narrow), x)
    assert numbers[0].eq(0).all()
    assert scales.isfinite().all() and numbers.isfinite().all()
    assert numbers[1:3].abs().amax(1).eq(LARGEST[narrow]).all()
    assert float(numbers[3].abs().max()) <= 1.0


@pytest.mark.parametrize("narrow", DTYPES)
@pytest.mark.parametrize(
    ("k", "bad"), [(128, math.nan), (128, math.inf), (128, -math.inf), (LARGEST_PIECE + 256, math.nan)]
)
def test_a_row_that_is_not_all_numbers_comes_to_none(k: int, bad: float, narrow: NarrowType) -> None:
    """So it shows in the logits, as without quantising; int8 itself has no way to say so."""
    x = torch.randn(2, k, generator=torch.Generator().manual_seed(4))
    x[1, 100] = bad
    numbers, scales = launched(operator(k, narrow), x)
    sums = (numbers * scales[:, None]).sum(1)
    assert sums[0].isfinite() and not sums[1].isfinite()


@pytest.mark.parametrize("narrow", DTYPES)
def test_rows_of_padding_are_left_alone_and_harm_nobody(narrow: NarrowType) -> None:
    layers = operator(64, narrow), operator(64, narrow, of_logits=1)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    alone = launched(layers[0], x)
    x[5:] = math.nan
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    note(state, tokens=5, rows=2)
    untouched = torch.full((16,), -7, dtype=torch.int32).view(DTYPES[narrow]).float()
    for layer, used in zip(layers, (5, 2), strict=True):
        numbers, scales = launched(layer, x, state)
        assert torch.equal(numbers[:used], alone[0][:used]) and torch.equal(scales[:used], alone[1][:used])
        assert scales[used:].isnan().all()
        assert torch.equal(numbers[used:].nan_to_num(), untouched.expand(9 - used, -1).nan_to_num())


def test_half_precision_is_rotated_in_single() -> None:
    x = torch.randn(2, 512, generator=torch.Generator().manual_seed(2)).half()
    numbers, scales = launched(operator(512, "int8"), x)
    wanted = rotated(x, 256)
    torch.testing.assert_close(scales, wanted.abs().amax(1) / 127, rtol=1e-4, atol=0)
    assert float((numbers - wanted / scales[:, None]).abs().max()) <= 0.5 + 1e-2


@pytest.mark.parametrize("rotation", [1, 2, 8, 16, 64, CHUNK.value])
def test_rotating_twice_is_not_at_all(rotation: int) -> None:
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(3))
    turned = rotated(x, rotation)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(rotated(turned, rotation), x, atol=1e-5, rtol=1e-5)
    assert rotation == 1 or float((turned - x).abs().max()) > 0.1


PTX_SCRIPT = """
from quire_build.tensorrt.kernels.compiled import compile_kernel
from quire_build.tensorrt.operators import PlainArithmetic, Quantize

cases = [(arch, k, 0) for arch in (80, 90) for k in (256, 4096, 14336, 28672)]
cases += [(arch, k, 1) for arch in (89, 90) for k in (4096, 28672)]
for arch, k, to_float in cases:
    layer = Quantize(k=k, rotation=1 if to_float else 256, to_float=to_float, of_logits=0)
    launch = layer.launch([(64, k), (1,)], PlainArithmetic())
    compiled = compile_kernel(
        launch.kernel,
        {name: kind.replace("model", "bf16") for name, kind in launch.types.items()},
        launch.constants, arch=arch, num_warps=launch.num_warps, num_stages=launch.num_stages,
    )
    assert compiled.threads <= 512
    assert f".target sm_{arch}" in compiled.ptx
    assert "ld.global.v4" in compiled.ptx, "narrow loads"
    assert not to_float or "cvt.rn.satfinite.e4m3x2.f32" in compiled.ptx
"""


def test_it_compiles_for_ampere_ada_and_hopper(tmp_path: Path) -> None:
    """In a process without this one's interpreter switch and cache."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PTX_SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
