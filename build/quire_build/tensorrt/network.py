"""A lowered graph as a TensorRT network.

The graph says what is computed; what is decided here is in which type, and for how large a pool.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import onnx
import torch
from onnx import NodeProto, TensorProto, numpy_helper
from torch import Tensor

from quire.errors import UnsupportedModelError
from quire.execution.engine_state import MAX_POOLS
from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES
from quire_build.quantization import Quantization
from quire_build.tensorrt.lowering.attention import POOL
from quire_build.tensorrt.lowering.graph import LINEAR_INPUTS, attribute
from quire_build.tensorrt.lowering.step import STATE
from quire_build.tensorrt.operators import OPERATORS
from quire_build.tensorrt.pairs import paired

TABLES = ("cosine", "sine")
"""Weights that stay float32, whatever the model's type is."""


@dataclass(frozen=True)
class PoolLayout:
    """The pool that a plan is built for: block-major, cut into tensors of whole blocks.

    Attributes:
        max_blocks: blocks of the largest pool, the null block included.
        num_pools: tensors ``kv_cache.0`` and so on.
        blocks_per_pool: blocks in each of them.
    """

    max_blocks: int
    num_pools: int
    blocks_per_pool: int

    @property
    def input_names(self) -> list[str]:
        """Of the network's inputs."""
        return [f"{POOL}.{i}" for i in range(self.num_pools)]


class NetworkWriter:
    """Adds the nodes of one lowered graph to a network.

    Args:
        network: a TensorRT network, made to prefer ahead-of-time plugins; `register_plugins` has been called.
        model: what `lower` returned, with or without its weights' data.
        weight: the checkpoint's tensors by name, in any type.
        dtype: type of weights and activations.
        kv_dtype: type of the pool, `dtype` or e4m3.
        quantization: of linear layers, the one that the model was lowered with; None for none.
        shared_bytes: shared memory that a program of a linear layer may have.
        multiprocessors: of the GPU.
        pool: how the pool will be bound.
        max_num_seqs: rows of logits in one step, at most.
    """

    def __init__(
        self,
        network: Any,
        model: onnx.ModelProto,
        weight: Callable[[str], Tensor],
        *,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        quantization: Quantization | None = None,
        shared_bytes: int = DEFAULT_SHARED_BYTES,
        multiprocessors: int,
        pool: PoolLayout,
        max_num_seqs: int,
    ) -> None:
        import tensorrt as trt

        self._trt, self._network, self._graph, self._weight = trt, network, model.graph, weight
        self._dtype, self._quantization, self._shared_bytes = dtype, quantization, shared_bytes
        self._multiprocessors = multiprocessors
        self._pool, self._kv_dtype, self._max_num_seqs = pool, kv_dtype, max_num_seqs
        self._types = {
            torch.bfloat16: trt.bfloat16,
            torch.float16: trt.float16,
            torch.float32: trt.float32,
            torch.int32: trt.int32,
        }
        self._kept: list[Tensor] = []
        """Weights, which TensorRT reads where they lie until the plan is built."""
        self._tensors: dict[str, Any] = {}
        self._constants: dict[tuple[str, int], Any] = {}
        self._integers = {
            initializer.name: numpy_helper.to_array(initializer)
            for initializer in self._graph.initializer
            if initializer.data_type == TensorProto.INT64
        }
        self._weights = {initializer.name for initializer in self._graph.initializer} - set(self._integers)
        self._stacks = {node.output[0]: node for node in self._graph.node if node.op_type == "Concat"}
        self._reordered = {
            node.output[0]: node
            for node in self._graph.node
            if node.op_type == "Gather" and node.input[1] in self._integers
        }

    def write(self) -> None:
        """Add inputs, nodes and outputs.

        Raises:
            UnsupportedModelError: at a node that a lowered graph should not have.
        """
        for given in self._graph.input:
            self._add_input(given)
        for node in self._graph.node:
            add = getattr(self, f"_add_{node.op_type.lower()}", None)
            if add is None:
                raise UnsupportedModelError(f"a plan cannot run {node.op_type} '{node.name}'")
            add(node)
        for made in self._graph.output:
            tensor = self._tensors[made.name]
            tensor.name = made.name
            self._network.mark_output(tensor)

    def _add_input(self, given: onnx.ValueInfoProto) -> None:
        if given.name == POOL:
            # As wide as elements come, because a dimension must stay below 2**31.
            for name in self._pool.input_names:
                self._tensors[name] = self._network.add_input(name, self._trt.int64, (-1,))
            self._tensors[POOL] = self._tensors[self._pool.input_names[0]]
            return
        types: dict[int, Any] = {
            TensorProto.INT32: self._trt.int32,
            TensorProto.INT64: self._trt.int64,
            TensorProto.FLOAT: self._trt.float32,
        }
        tensor_type = given.type.tensor_type
        shape = tuple(dim.dim_value or -1 for dim in tensor_type.shape.dim)
        self._tensors[given.name] = self._network.add_input(given.name, types[tensor_type.elem_type], shape)

    def _tensor(self, name: str, rank: int = 0) -> Any:
        """A tensor of the network; weights become constants, with leading ones up to `rank`."""
        if name in self._tensors:
            return self._tensors[name]
        if (name, rank) not in self._constants:
            self._constants[name, rank] = self._constant(self._data(name), rank)
        return self._constants[name, rank]

    def _constant(self, data: Tensor, rank: int = 0) -> Any:
        self._kept.append(data)
        values = self._trt.Weights(self._types[data.dtype], data.data_ptr(), data.numel())
        shape = (1,) * (rank - data.dim()) + tuple(data.shape)
        return self._network.add_constant(shape, values).get_output(0)

    def _data(self, name: str) -> Tensor:
        if name in self._reordered:
            source, order = self._source(name)
            return self._data(source)[order]
        if name in self._stacks:
            stack = self._stacks[name]
            return torch.cat([self._data(part) for part in stack.input], dim=attribute(stack, "axis"))
        dtype = torch.float32 if name in TABLES else self._dtype
        return self._weight(name).detach().to("cpu", dtype).contiguous()

    def _source(self, name: str) -> tuple[str, Any]:
        """The weight that a weight is made of, and in which order its rows are taken."""
        if name not in self._reordered:
            return name, slice(None)
        source, order = self._reordered[name].input
        return source, torch.tensor(self._integers[order])

    def _quantized(self, name: str, quantization: Quantization) -> tuple[Any, Any]:
        """A linear layer's weight [n, k] of eight bits, as the kernels take it, and its scales [groups, n].

        One of the checkpoint's tensors is quantised at a time, from its own type.
        """
        source, order = self._source(name)
        parts = self._stacks[source].input if source in self._stacks else [source]
        quantized = [quantization.weight(self._weight(part).detach().cpu(), self._dtype) for part in parts]
        values = torch.cat([part.values for part in quantized])[order]
        scales = torch.cat([part.scales for part in quantized])[order].T.contiguous()
        matrix = values.view(torch.int32) if quantization.inputs else paired(values)
        return self._constant(matrix), self._constant(scales)

    def _is_weight(self, name: str) -> bool:
        return name in self._weights or name in self._stacks or name in self._reordered

    def _add_concat(self, node: NodeProto) -> None:
        """Nothing: a Concat of weights is carried out where it is read."""
        if not all(self._is_weight(name) for name in node.input):
            raise UnsupportedModelError(f"a plan cannot run Concat '{node.name}' of anything but weights")

    def _add_gather(self, node: NodeProto) -> None:
        if node.output[0] in self._reordered:
            return  # a weight in another order, which is carried out where it is read
        data, indices = (self._tensor(name) for name in node.input)
        layer = self._network.add_gather(data, indices, attribute(node, "axis", 0))
        self._tensors[node.output[0]] = layer.get_output(0)

    def _add_cast(self, node: NodeProto) -> None:
        types = {TensorProto.FLOAT: self._trt.float32, TensorProto.INT64: self._trt.int64}
        layer = self._network.add_cast(self._tensor(node.input[0]), types[attribute(node, "to")])
        self._tensors[node.output[0]] = layer.get_output(0)

    def _add_mul(self, node: NodeProto) -> None:
        # Rows [T, k] times rows or a weight [k].
        first, second = (self._tensor(name, 2 if self._is_weight(name) else 0) for name in node.input)
        layer = self._network.add_elementwise(first, second, self._trt.ElementWiseOperation.PROD)
        self._tensors[node.output[0]] = layer.get_output(0)

    def _add_reshape(self, node: NodeProto) -> None:
        layer = self._network.add_shuffle(self._tensor(node.input[0]))
        layer.zero_is_placeholder = not attribute(node, "allowzero", 0)
        layer.reshape_dims = tuple(int(size) for size in self._integers[node.input[1]])
        self._tensors[node.output[0]] = layer.get_output(0)

    def _add_reducesum(self, node: NodeProto) -> None:
        axes = sum(1 << int(axis) for axis in self._integers[node.input[1]])
        keep = bool(attribute(node, "keepdims", 1))
        data = self._tensor(node.input[0])
        layer = self._network.add_reduce(data, self._trt.ReduceOperation.SUM, axes, keep)
        self._tensors[node.output[0]] = layer.get_output(0)

    def _add_stepbegin(self, node: NodeProto) -> None:
        names = self._pool.input_names
        pools = [self._tensors[name] for name in names + names[:1] * (MAX_POOLS - len(names))]
        inputs = [self._tensor(name) for name in node.input[:-1]]
        self._add_own(node, inputs + pools)

    def _add_with_state(self, node: NodeProto) -> None:
        self._add_own(node, [*(self._tensor(name) for name in node.input), self._tensors[STATE]])

    _add_kvwrite = _add_pagedattend = _add_quantize = _add_with_state

    def _add_linear(self, node: NodeProto) -> None:
        x, weight, squares, residual, next_norm, bias, *rest = _padded(node.input, LINEAR_INPUTS["Linear"])
        self._add_product(node, x, weight, [squares, residual, next_norm, bias], rest, [])

    def _add_projectqkv(self, node: NodeProto) -> None:
        x, weight, squares, bias, *others = _padded(node.input, LINEAR_INPUTS["ProjectQkv"])
        self._add_product(node, x, weight, [squares, bias], others[4:], others[:4])

    def _add_product(
        self,
        node: NodeProto,
        x: str,
        weight: str,
        surroundings: Sequence[str],
        narrow_rows: Sequence[str],
        pool: Sequence[str],
    ) -> None:
        """Add a linear layer, with what it reads around its product and what it writes to the pool by."""
        rows = self._tensor(x)
        # An input that is not read is bound to the rows.
        read = [self._tensor(name) if name else rows for name in surroundings]
        narrow = [self._tensor(name) for name in narrow_rows] or [rows, rows]
        quantization = self._quantization
        if quantization is not None:
            matrix, scales = self._quantized(weight, quantization)
        else:
            matrix, scales = self._tensor(weight), rows
        to_pool = [self._tensor(name) for name in pool]
        self._add_own(
            node,
            [rows, matrix, *read, scales, *narrow, *to_pool, self._tensors[STATE]],
            normed=0,
            epsilon=0.0,
            gated=0,
            adds_residual=0,
            wide_output=0,
            weight_group=quantization.group(attribute(node, "k")) if quantization else 0,
            weight_float=int(quantization is not None and quantization.narrow == "fp8"),
            narrow_rows=int(quantization is not None and quantization.inputs),
            shared_bytes=self._shared_bytes,
            multiprocessors=self._multiprocessors,
        )

    def _add_plainly(self, node: NodeProto) -> None:
        self._add_own(node, [self._tensor(name) for name in node.input])

    _add_assignsplits = _add_sample = _add_plainly  # nodes find theirs by name

    def _add_own(self, node: NodeProto, inputs: list[Any], **defaults: Any) -> None:
        """Add one of our operators: what the graph says, what this plan decides, what `defaults` leave."""
        import tensorrt.plugin as trtp

        operator = next(operator for operator in OPERATORS if operator.__name__ == node.op_type)
        decided = {
            "max_blocks": self._pool.max_blocks,
            "num_pools": self._pool.num_pools,
            "blocks_per_pool": self._pool.blocks_per_pool,
            "max_num_seqs": self._max_num_seqs,
            "kv_element_bytes": self._kv_dtype.itemsize,
        }
        values = defaults | decided | {a.name: attribute(node, a.name) for a in node.attribute}
        # TensorRT wants the attributes in the order in which they were registered.
        ordered = {field.name: values[field.name] for field in fields(operator)}  # type: ignore[arg-type]
        plugin = getattr(trtp.op.quire, node.op_type)(*inputs, **ordered)
        layer = self._network.add_plugin(plugin, aot=True)
        layer.name = f"{node.op_type}:{node.output[0]}"
        for index, name in enumerate(node.output):
            self._tensors[name] = layer.get_output(index)


def _padded(names: Sequence[str], least: int) -> list[str]:
    """A node's inputs, with those at the end that it leaves out."""
    return [*names, *[""] * (least - len(names))]
