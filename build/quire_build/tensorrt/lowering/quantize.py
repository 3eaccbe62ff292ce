"""Linear layers of eight bits read rows of eight bits, which an operator before them makes."""

from __future__ import annotations

from quire.errors import UnsupportedModelError
from quire_build.quantization import Quantization
from quire_build.tensorrt.lowering.graph import DOMAIN, LINEAR_INPUTS, Graph, attribute

LARGEST_SUM = (2**31 - 1) // 127**2
"""Products of int8 numbers that int32 holds the sum of."""


def lower_quantization(graph: Graph, quantization: Quantization) -> None:
    """Put a Quantize before every linear layer, one for all that read the same rows.

    It comes last: a norm's division by the root mean square, which is left to the linear layer, does not
    change what numbers a row becomes.

    Raises:
        UnsupportedModelError: a layer has more inputs than can be summed up, or no multiple of 4.
    """
    quantized: dict[str, list[str]] = {}
    for linear in [node for node in graph.nodes if node.op_type in LINEAR_INPUTS]:
        rows, k = linear.input[0], attribute(linear, "k")
        refused = f"a plan of {quantization.narrow} cannot run a linear layer of {k} inputs"
        if k % 4:
            raise UnsupportedModelError(f"{refused}, only of multiples of 4")
        if k > LARGEST_SUM:
            raise UnsupportedModelError(f"{refused}, only of up to {LARGEST_SUM}")
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
