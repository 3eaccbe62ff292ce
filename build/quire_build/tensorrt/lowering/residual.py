"""A linear layer whose result is added to the residual stream does the sum itself."""

from __future__ import annotations

from quire_build.tensorrt.lowering.graph import DOMAIN, Graph


def lower_residual_sums(graph: Graph) -> None:
    """Fuse every sum of the residual stream and a linear layer's result."""
    for add in graph.of_type("Add"):
        makers = [graph.producer(name) for name in add.input]
        linear = next((maker for maker in makers if maker is not None and maker.op_type == "Gemm"), None)
        if linear is None:
            continue
        residual = next(name for name in add.input if name != linear.output[0])
        weight = graph.weight_of(linear)
        bias = graph.bias_of([linear], "")
        graph.add(
            "Linear",
            [linear.input[0], weight, "", residual, "", bias],
            [add.output[0]],
            domain=DOMAIN,
            before=add,
            adds_residual=1,
            biased=int(bool(bias)),
            n=graph.size(weight, 0),
            k=graph.size(weight, 1),
        )
        graph.remove([linear, add])
