"""What linear layers are left, the output layer above all, become the operator of that name."""

from __future__ import annotations

from quire_build.tensorrt.lowering.graph import DOMAIN, Graph


def lower_linear(graph: Graph) -> None:
    """Replace every remaining linear layer; one that makes an output of the model keeps float32."""
    for gemm in graph.of_type("Gemm"):
        weight = graph.weight_of(gemm)
        bias = graph.bias_of([gemm], "")
        graph.add(
            "Linear",
            [gemm.input[0], weight, "", "", "", bias],
            [gemm.output[0]],
            domain=DOMAIN,
            before=gemm,
            biased=int(bool(bias)),
            wide_output=int(gemm.output[0] in graph.outputs),
            n=graph.size(weight, 0),
            k=graph.size(weight, 1),
        )
        graph.remove([gemm])
