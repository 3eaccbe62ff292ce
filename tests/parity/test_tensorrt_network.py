"""A lowered graph becomes the right TensorRT network.

TensorRT wants a GPU to build with, so a stand-in computes each layer with torch as it is added: what comes
out at the marked output must be the model's logits.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import os
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference.op_run import OpRun
from torch import Tensor

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by its own library functions too
pytest.importorskip("triton")

from tests.parity import test_tensorrt_lowering
from tests.parity.test_tensorrt_lowering import (
    NUM_BLOCKS,
    Array,
    evaluate,
    logits,
    model,
    padded_step,
    step,
)
from tests.parity.test_tensorrt_operators import run

from quire.errors import UnsupportedModelError
from quire.execution.manifest import Precision
from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES
from quire_build.quantization import PLANS
from quire_build.tensorrt import operators
from quire_build.tensorrt.builder import weight_bytes
from quire_build.tensorrt.lowering import lower, quantize
from quire_build.tensorrt.network import NetworkWriter, PoolLayout

__all__ = ["model"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")


class Layer:
    """A layer of the stand-in: its settings may change until an output is asked for."""

    def __init__(self, compute: Callable[[Layer], list[Tensor]]) -> None:
        self._compute, self._outputs = compute, list[Any]()
        self.name = ""
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
        self.plugins: list[Layer] = []
        self.constant_bytes = 0

    @property
    def layer_names(self) -> list[str]:
        return [layer.name for layer in self.plugins]

    def add_input(self, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        self.declared[name] = (dtype, len(shape))
        return SimpleNamespace(value=self._given[name], name=name)

    def add_constant(self, shape: tuple[int, ...], weights: tuple[str, int, int]) -> Layer:
        dtype, address, count = weights
        kind: Any = {"float32": ctypes.c_float, "int32": ctypes.c_int32}[dtype]
        data = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(kind)), (count,))
        self.constant_bytes += data.nbytes
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
        self.plugins.append(Layer(lambda _: plugin()))
        return self.plugins[-1]

    def mark_output(self, tensor: Any) -> None:
        self.marked[tensor.name] = tensor.value


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> list[operators.Operator]:
    """Stand-ins for the modules tensorrt and tensorrt.plugin; the operators that are made with them."""
    made: list[operators.Operator] = []

    def plugin(name: str) -> Callable[..., Callable[[], list[Tensor]]]:
        def create(*inputs: Any, **attributes: Any) -> Callable[[], list[Tensor]]:
            operator = getattr(operators, name)(**attributes)
            assert list(attributes) == [field.name for field in dataclasses.fields(operator)]
            assert len(inputs) == len(operator.INPUTS)
            made.append(operator)
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
    return made


def written(
    model: onnx.ModelProto,
    precision: Precision = "float32",
    inputs: dict[str, Array] | None = None,
    shared_bytes: int = DEFAULT_SHARED_BYTES,
    kv_dtype: torch.dtype = torch.float32,
) -> Network:
    """The stand-in with a model in it, computed on `inputs`, or those of `step`."""
    weights = {w.name: torch.tensor(numpy_helper.to_array(w)) for w in model.graph.initializer}
    lowered = copy.deepcopy(model)
    lower(lowered, PLANS.get(precision))
    given = {name: torch.from_numpy(array) for name, array in (inputs or step()).items()}
    given["kv_cache.0"] = given.pop("kv_cache").to(kv_dtype)
    network = Network(given)
    pool = PoolLayout(max_blocks=NUM_BLOCKS, num_pools=1, blocks_per_pool=NUM_BLOCKS)
    writer = NetworkWriter(
        network,
        lowered,
        weights.__getitem__,
        dtype=torch.float32,
        kv_dtype=kv_dtype,
        quantization=PLANS.get(precision),
        shared_bytes=shared_bytes,
        multiprocessors=3,
        pool=pool,
        max_num_seqs=8,
    )
    writer.write()
    return network


@pytest.mark.usefixtures("tensorrt")
def test_network_computes_the_models_logits(model: onnx.ModelProto) -> None:
    network = written(model)
    assert network.declared["kv_cache.0"] == ("int64", 1)
    assert network.declared["block_tables"] == ("int32", 2)
    assert network.declared["sampling"] == ("float32", 2)
    expected = logits(model)
    np.testing.assert_allclose(network.marked["logits"].numpy(), expected, atol=2e-4, rtol=2e-4)
    assert network.marked["sampled_ids"].tolist() == expected.argmax(-1).tolist()
    assert network.marked["pool_info"].tolist() == [NUM_BLOCKS, 77]
    assert "PagedAttend:" in "".join(network.layer_names)


@pytest.mark.parametrize("precision", ["float32", "int8-weights", "int8"])
@pytest.mark.usefixtures("tensorrt")
def test_padding_changes_no_logits_and_samples_nothing(model: onnx.ModelProto, precision: Precision) -> None:
    """What the operators leave out stays as `run` has made it: not a number, and -7."""
    alone, padded = written(model, precision), written(model, precision, padded_step())
    assert padded.marked["logits"].shape == (6, 48)
    np.testing.assert_allclose(
        padded.marked["logits"][:3].numpy(), alone.marked["logits"].numpy(), atol=2e-4, rtol=2e-4
    )
    assert padded.marked["sampled_ids"].tolist() == [*alone.marked["sampled_ids"].tolist(), -7, -7, -7]
    assert padded.marked["pool_info"].tolist() == [NUM_BLOCKS, 77]


@pytest.mark.parametrize("shared_bytes", [DEFAULT_SHARED_BYTES, 227 * 1024])
def test_linear_layers_know_the_gpu_and_which_of_them_makes_logits(
    model: onnx.ModelProto, tensorrt: list[operators.Operator], shared_bytes: int
) -> None:
    written(model, shared_bytes=shared_bytes)
    products = [op for op in tensorrt if isinstance(op, operators.Linear | operators.ProjectQkv)]
    assert {(product.shared_bytes, product.multiprocessors) for product in products} == {(shared_bytes, 3)}
    layers = [product for product in products if isinstance(product, operators.Linear)]
    assert len(layers) == len(products) - 2
    assert [layer.wide_output for layer in layers] == [0] * (len(layers) - 1) + [1]


def quantized_weights(model: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """The model with the weights that a plan of eight bits computes with."""
    quantized = copy.deepcopy(model)
    linear = {node.input[1] for node in model.graph.node if node.op_type == "Gemm"}
    assert "lm_head.weight" in linear
    for weight in quantized.graph.initializer:
        if weight.name in linear:
            values = PLANS[precision].weight(torch.tensor(numpy_helper.to_array(weight)), torch.float32)
            weight.CopyFrom(numpy_helper.from_array(values.dequantized().numpy(), weight.name))
    return quantized


@pytest.mark.parametrize("precision", ["int8-weights", "fp8-weights"])
@pytest.mark.usefixtures("tensorrt")
def test_network_of_eight_bits_computes_the_logits_of_the_quantised_model(
    model: onnx.ModelProto, precision: Precision
) -> None:
    """The last group of the down projection, with 80 inputs, is shorter than the others."""
    network = written(model, precision)
    expected = logits(quantized_weights(model, precision))
    np.testing.assert_allclose(network.marked["logits"].numpy(), expected, atol=2e-4, rtol=2e-4)
    assert np.abs(logits(model) - expected).max() > 0.01


def with_quantized_rows(model: onnx.ModelProto, precision: Precision) -> Array:
    """Its logits by ONNX's own matrix products, each of rows that were quantised as the decoder's are."""

    class Gemm(OpRun):
        op_domain = ""

        def _run(self, x: Array, weight: Array, **_: Any) -> tuple[Array]:
            return ((PLANS[precision].input(torch.from_numpy(x)) @ torch.from_numpy(weight).T).numpy(),)

    return evaluate(model, "logits", more_operators=[Gemm])[0]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.usefixtures("tensorrt")
def test_network_of_rows_of_eight_bits_computes_the_logits_of_the_quantised_model(
    model: onnx.ModelProto, precision: Precision
) -> None:
    """But for numbers that lie between two of eight bits."""
    expected = with_quantized_rows(quantized_weights(model, precision), precision)
    distance = np.linalg.norm(logits(model) - expected)
    network = written(model, precision)
    error = np.linalg.norm(network.marked["logits"].numpy() - expected)
    assert error < 0.2 * distance
    assert error < 0.005 * np.linalg.norm(expected)


@pytest.mark.parametrize("precision", ["float32", "int8-weights", "int8"])
@pytest.mark.usefixtures("tensorrt")
def test_the_weights_take_as_much_as_the_pools_size_rests_on(
    model: onnx.ModelProto, precision: Precision
) -> None:
    """But for channels that are added to fill a block, which are many in a model as small as this."""
    expected = written(model, precision).constant_bytes
    assert weight_bytes(model, 4, PLANS.get(precision)) == pytest.approx(expected, rel=0.02)


def test_network_over_a_pool_of_fp8_computes_the_logits_of_kv_rounded_to_it(
    model: onnx.ModelProto, tensorrt: list[operators.Operator], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounded(values: Array) -> Array:
        narrow = torch.from_numpy(values).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        return np.asarray(narrow.float().numpy())

    unrounded, inputs = logits(model), step()
    inputs |= {name: rounded(array) for name, array in inputs.items() if "_cache" in name}
    attend = test_tensorrt_lowering.PagedAttention._run

    def attend_rounded(
        self: Any, query: Array, key: Array, value: Array, *rest: Array, **scalars: Any
    ) -> Any:
        return attend(self, query, rounded(key), rounded(value), *rest, **scalars)

    monkeypatch.setattr(test_tensorrt_lowering, "step", lambda: inputs)
    monkeypatch.setattr(test_tensorrt_lowering.PagedAttention, "_run", attend_rounded)
    expected = logits(model)
    network = written(model, inputs=inputs, kv_dtype=torch.float8_e4m3fn)
    np.testing.assert_allclose(network.marked["logits"].numpy(), expected, atol=2e-4, rtol=2e-4)
    assert np.abs(unrounded - expected).max() > 0.1
    own = [operator for operator in tensorrt if hasattr(operator, "kv_element_bytes")]
    assert [operator.kv_element_bytes for operator in own] == [1] * 5


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.parametrize("fewer", [1, 2, 3])
def test_int8_needs_whole_words_of_a_row(model: onnx.ModelProto, fewer: int) -> None:
    other = copy.deepcopy(model)
    for weight in other.graph.initializer:
        if weight.name == "lm_head.weight":
            values = numpy_helper.to_array(weight)[:, :-fewer].copy()
            weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    with pytest.raises(UnsupportedModelError, match=f"{64 - fewer} inputs, only of multiples of 4"):
        written(other, "int8")


@pytest.mark.usefixtures("tensorrt")
def test_int8_refuses_more_inputs_than_int32_holds_the_sum_of(
    model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert quantize.LARGEST_SUM * 127**2 < 2**31 <= (quantize.LARGEST_SUM + 1) * 127**2
    monkeypatch.setattr(quantize, "LARGEST_SUM", 72)
    with pytest.raises(UnsupportedModelError, match="80 inputs, only of up to 72"):
        written(model, "int8")
