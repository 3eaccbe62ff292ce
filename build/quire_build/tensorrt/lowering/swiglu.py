"""silu(gate(x)) * up(x) becomes one gated linear layer."""

from __future__ import annotations

from quire_build.tensorrt.lowering.graph import DOMAIN, Graph


def lower_swiglu(graph: Graph) -> None:
    """Fuse every pair of linear layers that a SiLU gate joins."""
    for sigmoid in graph.of_type("Sigmoid"):
        gate = graph.producer(sigmoid.input[0])
        (silu,) = graph.readers(sigmoid.output[0])
        (product,) = graph.readers(silu.output[0])
        other = next(name for name in product.input if name != silu.output[0])
        up = graph.producer(other)
        assert gate is not None
        assert up is not None
        weight = f"{product.output[0]}.gate_up"
        graph.add("Concat", [graph.weight_of(gate), graph.weight_of(up)], [weight], before=gate, axis=0)
        bias = graph.bias_of([gate, up], f"{product.output[0]}.gate_up_bias")
        graph.add(
            "Linear",
            [gate.input[0], weight, "", "", "", bias],
            [product.output[0]],
            domain=DOMAIN,
            before=product,
            gated=1,
            biased=int(bool(bias)),
            n=graph.size(graph.weight_of(gate), 0),
            k=graph.size(graph.weight_of(gate), 1),
        )
        graph.remove([gate, up, sigmoid, silu, product])
