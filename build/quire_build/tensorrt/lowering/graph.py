"""An ONNX graph that rewrites can ask who makes a tensor and who reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from quire.errors import UnsupportedModelError

DOMAIN = "quire"
LINEAR_INPUTS: Mapping[str, int] = {"Linear": 6, "ProjectQkv": 8}
"""Operators that are linear layers: how many inputs they have, of which rows, weight and sums of squares come
first. Rows of eight bits and their scales may come behind."""


class Graph:
    """A view of a model's graph; `finish` puts what the rewrites left back in order."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.weights = {weight.name: weight for weight in model.graph.initializer}
        self.outputs = {output.name for output in model.graph.output}

    def producer(self, tensor: str) -> NodeProto | None:
        """The node that makes a tensor; None for inputs and weights."""
        return next((node for node in self.nodes if tensor in node.output), None)

    def readers(self, tensor: str) -> list[NodeProto]:
        """The nodes that read a tensor."""
        return [node for node in self.nodes if tensor in node.input]

    def of_type(self, operator: str) -> list[NodeProto]:
        """The nodes of one operator, in the graph's order."""
        return [node for node in self.nodes if node.op_type == operator]

    def add(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        domain: str = "",
        before: NodeProto | None = None,
        **attributes: Any,
    ) -> NodeProto:
        """Add a node, at the place of `before` if there is one."""
        node = helper.make_node(operator, inputs, outputs, domain=domain, **attributes)
        self.nodes.insert(len(self.nodes) if before is None else self.nodes.index(before), node)
        return node

    def remove(self, nodes: Iterable[NodeProto]) -> None:
        """Take nodes out; whoever read their outputs must be given others, or be taken out too."""
        gone = {id(node) for node in nodes}
        self.nodes = [node for node in self.nodes if id(node) not in gone]

    def weight_of(self, gemm: NodeProto) -> str:
        """The weight [n, k] of a plain linear layer.

        Raises:
            UnsupportedModelError: if it is no such layer.
        """
        if gemm.op_type != "Gemm" or attribute(gemm, "transB", 0) != 1:
            raise UnsupportedModelError(f"a plan cannot run {gemm.op_type} '{gemm.name}' as a linear layer")
        return str(gemm.input[1])

    def bias_of(self, layers: Sequence[NodeProto], stack: str) -> str:
        """The biases of linear layers, one after another under the name `stack`; empty if none has any.

        Raises:
            UnsupportedModelError: if some have a bias and some have none.
        """
        biases = [str(layer.input[2]) for layer in layers if len(layer.input) > 2]
        if not biases:
            return ""
        if len(biases) != len(layers):
            raise UnsupportedModelError(f"a plan cannot run {biases} while layers beside have no bias")
        if len(biases) == 1:
            return biases[0]
        self.add("Concat", biases, [stack], axis=0)
        return stack

    def integers(self, name: str, values: Sequence[int]) -> str:
        """A constant of int64 under this name: a new one, or one of the same values that is there."""
        if name not in self.weights:
            tensor = numpy_helper.from_array(np.array(values, dtype=np.int64), name)
            self.model.graph.initializer.append(tensor)
            self.weights[name] = tensor
        assert numpy_helper.to_array(self.weights[name]).tolist() == list(values)
        return name

    def size(self, weight: str, axis: int) -> int:
        """A dimension of a weight, or of a Concat of weights along axis 0."""
        if weight in self.weights:
            return int(self.weights[weight].dims[axis])
        concat = self.producer(weight)
        assert concat is not None
        assert concat.op_type == "Concat"
        sizes = [self.size(part, axis) for part in concat.input]
        return sum(sizes) if axis == 0 else sizes[0]

    def finish(self) -> None:
        """Write the nodes back, without those whose outputs nobody reads, each after what it reads."""
        wanted, kept = set(self.outputs), []
        for node in reversed(_in_order(self.nodes)):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted.update(node.input)
        graph = self.model.graph
        del graph.node[:]
        graph.node.extend(reversed(kept))
        unused = [weight for weight in graph.initializer if weight.name not in wanted]
        for weight in unused:
            graph.initializer.remove(weight)
        del graph.value_info[:]
        if all(imported.domain != DOMAIN for imported in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(DOMAIN, 1))


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _in_order(nodes: list[NodeProto]) -> list[NodeProto]:
    """The nodes, each after the makers of what it reads."""
    maker = {output: node for node in nodes for output in node.output if output}
    placed: set[int] = set()
    ordered: list[NodeProto] = []
    for last in nodes:
        stack = [last]
        while stack:
            node = stack[-1]
            missing = [maker[i] for i in node.input if i in maker and id(maker[i]) not in placed]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            if id(node) not in placed:
                placed.add(id(node))
                ordered.append(node)
    return ordered
