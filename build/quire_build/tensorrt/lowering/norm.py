"""RMSNorm dissolves into its neighbours.

Whoever makes the rows also leaves them times the norm's weight, and the sums of their squares; the linear
layers behind the norm read these and divide by the root mean square afterwards.
"""

from __future__ import annotations

from onnx import NodeProto, TensorProto

from quire.errors import UnsupportedModelError
from quire_build.tensorrt.kernels.linear import SQUARES_WIDTH
from quire_build.tensorrt.lowering.graph import LINEAR_INPUTS, Graph, attribute


def lower_norms(graph: Graph) -> None:
    """Dissolve every RMSNorm.

    Raises:
        UnsupportedModelError: if a norm has other readers than linear layers, or its size does not divide.
    """
    for norm in graph.of_type("RMSNormalization"):
        size = graph.size(norm.input[1], 0)
        if size % SQUARES_WIDTH.value:
            raise UnsupportedModelError(
                f"a plan cannot run a hidden size of {size}; it must be a multiple of {SQUARES_WIDTH.value}"
            )
        normed, squares = _split(graph, norm.input[0], norm)
        for reader in graph.readers(norm.output[0]):
            if reader.op_type not in LINEAR_INPUTS or reader.input[0] != norm.output[0]:
                raise UnsupportedModelError(f"a plan cannot run {reader.op_type} behind a norm yet")
            graph.add(
                reader.op_type,
                [normed, reader.input[1], squares, *reader.input[3:]],
                list(reader.output),
                domain=reader.domain,
                before=reader,
                normed=1,
                epsilon=attribute(norm, "epsilon"),
                **{a.name: attribute(reader, a.name) for a in reader.attribute},
            )
            graph.remove([reader])
        graph.remove([norm])


def _split(graph: Graph, rows: str, norm: NodeProto) -> tuple[str, str]:
    """The rows times the norm's weight, and the sums of their squares."""
    maker = graph.producer(rows)
    weight = norm.input[1]
    normed, squares = f"{rows}.normed", f"{rows}.squares"
    if maker is not None and maker.op_type == "Linear" and attribute(maker, "adds_residual"):
        graph.add(
            "Linear",
            [*maker.input[:4], weight, *maker.input[5:]],
            [rows, normed, squares],
            domain=maker.domain,
            before=maker,
            **{a.name: attribute(maker, a.name) for a in maker.attribute},
        )
        graph.remove([maker])
    elif maker is not None and maker.op_type == "Gather" and graph.producer(maker.input[0]) is not None:
        # The rows that want logits, picked from the last residual sum.
        all_normed, all_squares = _split(graph, maker.input[0], norm)
        graph.add("Gather", [all_normed, maker.input[1]], [normed], before=maker, axis=0)
        graph.add("Gather", [all_squares, maker.input[1]], [squares], before=maker, axis=0)
    else:
        size = graph.size(weight, 0)
        width = SQUARES_WIDTH.value
        shape = graph.integers(f"{rows}.squares_shape", [0, size // width, width])
        axis = graph.integers(f"{rows}.squares_axis", [2])
        graph.add("Mul", [rows, weight], [normed], before=norm)
        graph.add("Cast", [rows], [f"{rows}.wide"], before=norm, to=TensorProto.FLOAT)
        graph.add("Mul", [f"{rows}.wide", f"{rows}.wide"], [f"{rows}.square"], before=norm)
        graph.add("Reshape", [f"{rows}.square", shape], [f"{rows}.parts"], before=norm)
        graph.add("ReduceSum", [f"{rows}.parts", axis], [squares], before=norm, keepdims=0)
    return normed, squares
