"""Linear layers of eight bits read rows of eight bits, which an operator before them makes."""

from __future__ import annotations

from quire_build.quantization import Quantization
from quire_build.tensorrt.lowering.graph import DOMAIN, LINEAR_INPUTS, Graph, attribute


def lower_quantization(graph: Graph, quantization: Quantization) -> None:
    """Put a Quantize before every linear layer, one for all that read the same rows.

    It comes last: a norm's division by the root mean square, which is left to the linear layer, does not
    change what numbers a row becomes.
    """
    quantized: dict[str, list[str]] = {}
    for linear in [node for node in graph.nodes if node.op_type in LINEAR_INPUTS]:
        rows, k = linear.input[0], attribute(linear, "k")
        if rows not in quantized:
            quantized[rows] = [f"{rows}.numbers", f"{rows}.scales"]
            graph.add(
                "Quantize",
                [rows],
                quantized[rows],
                domain=DOMAIN,
                before=linear,
                k=k,
                rotation=quantization.rotation(k),
                to_float=int(quantization.narrow == "fp8"),
                of_logits=attribute(linear, "wide_output", 0),
            )
        missing = [""] * (LINEAR_INPUTS[linear.op_type] - len(linear.input))
        linear.input.extend([*missing, *quantized[rows]])
