"""A lowered graph becomes the right TensorRT network, and its tiles fit what a plan can launch.

TensorRT wants a GPU to build with, so a stand-in computes each layer with torch as it is added: what comes
out at the marked output must be the model's logits.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by its own library functions too
pytest.importorskip("triton")

from tests.parity.test_tensorrt_lowering import NUM_BLOCKS, logits, model, step
from tests.parity.test_tensorrt_operators import run

from quire_build.tensorrt import operators
from quire_build.tensorrt.lowering import lower
from quire_build.tensorrt.network import NetworkWriter

__all__ = ["model"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")


class Layer:
    """A layer of the stand-in: its settings may change until an output is asked for."""

    def __init__(self, compute: Callable[[Layer], list[Tensor]]) -> None:
        self._compute, self._outputs = compute, list[Any]()
        self.reshape_dims: tuple[int, ...] = ()
        self.zero_is_placeholder = True

    def get_output(self, index: int) -> Any:
        if not self._outputs:
            self._outputs = [SimpleNamespace(value=value, name="") for value in self._compute(self)]
        return self._outputs[index]


class Network:
    """As much of INetworkDefinition as `NetworkWriter` uses, computing with torch."""

    def __init__(self, given: dict[str, Tensor]) -> None:
        self._given = given
        self.declared: dict[str, tuple[str, int]] = {}
        self.marked: dict[str, Tensor] = {}

    def add_input(self, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        self.declared[name] = (dtype, len(shape))
        return SimpleNamespace(value=self._given[name], name=name)

    def add_constant(self, shape: tuple[int, ...], weights: tuple[str, int, int]) -> Layer:
        dtype, address, count = weights
        assert dtype == "float32"
        data = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,))
        return Layer(lambda _: [torch.from_numpy(data).view(shape)])

    def add_gather(self, data: Any, indices: Any, axis: int) -> Layer:
        return Layer(lambda _: [data.value.index_select(axis, indices.value.long())])

    def add_cast(self, data: Any, dtype: str) -> Layer:
        return Layer(lambda _: [data.value.to(getattr(torch, dtype))])

    def add_elementwise(self, first: Any, second: Any, operation: str) -> Layer:
        assert operation == "PROD"
        assert first.value.dim() == second.value.dim(), "TensorRT does not add leading dimensions"
        return Layer(lambda _: [first.value * second.value])

    def add_shuffle(self, data: Any) -> Layer:
        def compute(layer: Layer) -> list[Tensor]:
            kept = data.value.shape if layer.zero_is_placeholder else ()
            shape = [kept[i] if size == 0 else size for i, size in enumerate(layer.reshape_dims)]
            return [data.value.reshape(shape)]

        return Layer(compute)

    def add_reduce(self, data: Any, operation: str, axes: int, keep: bool) -> Layer:
        assert operation == "SUM"
        dims = [axis for axis in range(data.value.dim()) if axes >> axis & 1]
        return Layer(lambda _: [data.value.sum(dims, keepdim=keep)])

    def add_plugin(self, plugin: Callable[[], list[Tensor]], *, aot: bool) -> Layer:
        assert aot
        return Layer(lambda _: plugin())

    def mark_output(self, tensor: Any) -> None:
        self.marked[tensor.name] = tensor.value


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the modules tensorrt and tensorrt.plugin."""

    def plugin(name: str) -> Callable[..., Callable[[], list[Tensor]]]:
        def create(*inputs: Any, **attributes: Any) -> Callable[[], list[Tensor]]:
            operator = getattr(operators, name)(**attributes)
            assert list(attributes) == [field.name for field in dataclasses.fields(operator)]
            assert len(inputs) == len(operator.INPUTS)
            return lambda: run(operator, [tensor.value for tensor in inputs])

        return create

    trt, trtp = ModuleType("tensorrt"), ModuleType("tensorrt.plugin")
    names = {name: name for name in ("float32", "float16", "bfloat16", "int32", "int64")}
    trt.__dict__.update(
        names,
        Weights=lambda dtype, address, count: (dtype, address, count),
        ElementWiseOperation=SimpleNamespace(PROD="PROD"),
        ReduceOperation=SimpleNamespace(SUM="SUM"),
        plugin=trtp,
    )
    own = {operator.__name__: plugin(operator.__name__) for operator in operators.OPERATORS}
    trtp.__dict__["op"] = SimpleNamespace(quire=SimpleNamespace(**own))
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", trtp)


@pytest.mark.usefixtures("tensorrt")
def test_network_computes_the_models_logits(model: onnx.ModelProto) -> None:
    weights = {w.name: torch.tensor(numpy_helper.to_array(w)) for w in model.graph.initializer}
    lowered = copy.deepcopy(model)
    lower(lowered)
    given = {name: torch.from_numpy(array) for name, array in step().items()}
    given["kv_cache"].view(-1).view(torch.int64)[0] = NUM_BLOCKS
    network = Network(given)
    writer = NetworkWriter(network, lowered, weights.__getitem__, dtype=torch.float32, max_blocks=NUM_BLOCKS)
    writer.write()
    assert network.declared["kv_cache"] == ("int64", 1)
    assert network.declared["block_tables"] == ("int32", 2)
    np.testing.assert_allclose(network.marked["logits"].numpy(), logits(model), atol=2e-4, rtol=2e-4)


COMPILE_SCRIPT = """
from quire_build.tensorrt.kernels.compiled import compile_kernel
from quire_build.tensorrt.network import decode_tile
from quire_build.tensorrt.operators import MODEL, Linear, PagedAttend, PlainArithmetic
from dataclasses import asdict

shapes = [(6144, 4096, 0), (4096, 4096, 0), (14336, 4096, 1), (4096, 14336, 0), (128256, 4096, 0)]
operators = [
    Linear(k=k, n=n, normed=1, epsilon=1e-5, gated=gated, biased=1, adds_residual=int(n <= k), wide_output=0,
           **asdict(decode_tile(n, k, bool(gated))))
    for n, k, gated in shapes
]
operators += [PagedAttend(0, 1, 32, 8, 128, 16, 100, 0, 0.1, rows) for rows in (16, 64)]
for operator in operators:
    launch = operator.launch([(3, 1), (3, 9)], PlainArithmetic())
    types = {name: kind.replace(MODEL, "bf16") for name, kind in launch.types.items()}
    compile_kernel(launch.kernel, types, launch.constants, arch=90,
                   num_warps=launch.num_warps, num_stages=launch.num_stages)
print("all fit")
"""


def test_every_tile_fits_the_shared_memory_that_a_plan_can_launch_with(tmp_path: object) -> None:
    """`compile_kernel` refuses what does not. In a process of its own, without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "all fit\n", done.stderr
