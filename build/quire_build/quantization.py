"""Numbers of few bits: what quantised weights, activations and KV are, and the decoder as they make it.

A weight [n, k] becomes int8 or float8 (e4m3). A kernel multiplies the narrow numbers, as they are or widened
to bf16, which holds them exactly, and scales sums of products. `PLANS` says what plans have: weights with one
scale for each output channel n and `WEIGHT_GROUP` inputs, or weights with one scale for the channel and
activations with one for each token, found as it comes. One scale for a whole tensor of activations, found by
calibration, is here to be measured.
The decoders made here compute in float32 on numbers rounded as an engine of that precision rounds them: the
numerics gate measures with them what a precision costs.

**Rotation.** A few inputs of a layer are much larger than the others and would take an integer's scale for
themselves. Multiplied with an orthogonal matrix they spread over all, and with the weight multiplied by the
same one, products stay what they were (QuaRot, https://arxiv.org/abs/2404.00456). Floats have no use for
it: their precision goes with the number.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quire.execution.manifest import Precision
from quire_build.decoder import Decoder, Layer, RMSNorm

NarrowType = Literal["int8", "fp8"]
InputScales = Literal["tensor", "token"]

LARGEST: Mapping[NarrowType, float] = {"int8": 127.0, "fp8": 448.0}
"""The largest number that a scale maps to; int8 leaves -128 out, so that both signs reach as far."""
DTYPES: Mapping[NarrowType, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
KEPT = ("lm_head",)
"""Linear layers that are not quantised by channels: the head's errors go straight into the logits. In groups
they are small enough."""
WEIGHT_GROUP = 64
"""Inputs of an output channel that share a scale, in a plan; the last group of a channel may be shorter."""
LARGEST_ROTATION = 256
"""Inputs that are rotated together, at most."""
_ELEMENTS_AT_ONCE = 1 << 20
"""Of a weight that is quantised, widened to float32."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight of few bits: `values` [n, k] times `scales` [n], or [n, k / group] by groups of inputs."""

    values: Tensor
    """int8 or float8_e4m3fn."""
    scales: Tensor
    """float32; by groups, the type that an engine reads."""
    group: int = 0
    """Inputs that share a scale; 0 if all of a channel do."""
    rotation: int = 1
    """Inputs that were rotated together; 1 for none."""

    def dequantized(self) -> Tensor:
        """float32 [n, k], rotated back."""
        scales = self.scales.float()
        if not self.group:
            return self.values.float() * scales[:, None]
        scales = scales.repeat_interleave(self.group, 1)[:, : self.values.shape[1]]
        return rotated(self.values.float() * scales, self.rotation)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The largest absolute values that a decoder showed, by the names of its linear layers."""

    weight_amax: dict[str, Tensor] = field(default_factory=dict)
    """float32 [n], of each output channel."""
    input_amax: dict[str, float] = field(default_factory=dict)
    """Of the layer's whole input, over the calibration text."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a plan of eight bits quantises its linear layers."""

    narrow: NarrowType
    inputs: bool
    """Whether their inputs are of eight bits too (W8A8), and not weights alone (W8A16)."""

    def group(self, k: int) -> int:
        """How many of an output channel's `k` inputs share a scale."""
        return k if self.inputs else WEIGHT_GROUP

    def rotation(self, k: int) -> int:
        """How many of `k` inputs are rotated together, a power of two that divides k; 1 for none."""
        return min(k & -k, LARGEST_ROTATION) if self.inputs and self.narrow == "int8" else 1

    def weight(self, weight: Tensor, scale_dtype: torch.dtype) -> QuantizedWeight:
        """A layer's weight [n, k] as a plan has it."""
        k = weight.shape[1]
        return quantize_in_groups(weight, self.narrow, scale_dtype, self.group(k), self.rotation(k))

    def input(self, x: Tensor) -> Tensor:
        """What becomes of a layer's inputs [T, k], float32."""
        if not self.inputs:
            return x
        rotation = self.rotation(x.shape[-1])
        return rotated(_by_token(rotated(x, rotation), self.narrow), rotation)


PLANS: Mapping[Precision, Quantization] = {
    "int8": Quantization("int8", inputs=True),
    "fp8": Quantization("fp8", inputs=True),
    "int8-weights": Quantization("int8", inputs=False),
    "fp8-weights": Quantization("fp8", inputs=False),
}
"""The precisions that quantise."""


def rotated(x: Tensor, rotation: int) -> Tensor:
    """Rows [..., k] with each `rotation` inputs, a power of two that divides k, times a Hadamard matrix.

    It is Sylvester's, over the root of its size: symmetric and orthogonal, so that rotating twice gives x.
    """
    if rotation == 1:
        return x
    matrix = torch.ones(1, 1, device=x.device)
    while len(matrix) < rotation:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = matrix * rotation**-0.5
    turned: Tensor = x.float().view(*x.shape[:-1], -1, rotation) @ matrix
    return turned.flatten(-2)


def quantize_weights(weight: Tensor, narrow: NarrowType, amax: Tensor | None = None) -> QuantizedWeight:
    """Quantise a weight [n, k], symmetric, each output channel by itself.

    Args:
        weight: any floating-point type.
        narrow: the type to quantise to.
        amax: [n] absolute values that become the largest number; beyond them values saturate. None takes the
            largest of each channel.
    """
    weight = weight.float()
    if amax is None:
        amax = weight.abs().amax(1)
    scales = torch.where(amax > 0, amax.float() / LARGEST[narrow], 1.0)
    return QuantizedWeight(_narrowed(weight / scales[:, None], narrow), scales)


def quantize_in_groups(
    weight: Tensor,
    narrow: NarrowType,
    scale_dtype: torch.dtype,
    group: int = WEIGHT_GROUP,
    rotation: int = 1,
) -> QuantizedWeight:
    """Quantise a weight [n, k], symmetric, each `group` inputs of an output channel by themselves.

    Some rows at a time, so that beside the weight and the result little memory is needed.

    Args:
        weight: any floating-point type.
        narrow: the type to quantise to.
        scale_dtype: of the scales. Numbers are chosen for the rounded scales, which so cost nothing.
        group: inputs that share a scale; the last group is shorter where it does not divide k.
        rotation: inputs that are rotated together before that.
    """
    n, k = weight.shape
    groups = -(-k // group)
    values = torch.empty(n, k, dtype=DTYPES[narrow], device=weight.device)
    scales = torch.empty(n, groups, dtype=scale_dtype, device=weight.device)
    rows = max(1, _ELEMENTS_AT_ONCE // k)
    for first in range(0, n, rows):
        part = rotated(weight[first : first + rows].float(), rotation)
        padded = nn.functional.pad(part, (0, groups * group - k)).view(len(part), groups, group)
        scale = (padded.abs().amax(2) / LARGEST[narrow]).to(scale_dtype)
        scale[scale == 0] = 1.0
        narrowed = _narrowed(padded / scale.float()[:, :, None], narrow)
        values[first : first + rows] = narrowed.view(len(part), -1)[:, :k]
        scales[first : first + rows] = scale
    return QuantizedWeight(values, scales, group, rotation)


def quantized_linears(decoder: Decoder) -> dict[str, nn.Linear]:
    """The linear layers that quantisation replaces, by their names in the decoder."""
    return {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and name not in KEPT
    }


def rounded_decoder(decoder: Decoder, dtype: torch.dtype) -> Decoder:
    """A copy that rounds as an engine of model type `dtype` does: see `round_in_place`."""
    rounded = copy.deepcopy(decoder)
    round_in_place(rounded, dtype)
    return rounded


def round_in_place(decoder: Decoder, dtype: torch.dtype) -> None:
    """Make a decoder round as an engine of model type `dtype` does: weights and what layers hand on.

    Products are accumulated and norms, rotation and softmax computed in float32, as the engine's kernels do.
    """

    def rounds(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).float()

    def inputs(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounds(arguments[0]), *arguments[1:])

    def output(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> Any:
        return (rounds(result[0]), *result[1:]) if isinstance(result, tuple) else rounds(result)

    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(rounds(parameter))
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(inputs)
        if isinstance(module, nn.Linear | nn.Embedding | RMSNorm | Layer) and name not in KEPT:
            module.register_forward_hook(output)


def plan_decoder(decoder: Decoder, quantization: Quantization, *, head: bool = True) -> Decoder:
    """A copy that computes as a plan of eight bits does; plans have the head with it.

    Every linear layer is quantised; everything else is rounded to bf16.

    Args:
        decoder: float32.
        quantization: of the layers.
        head: quantise the output layer too.
    """

    def inputs(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantization.input(arguments[0]), *arguments[1:])

    rounded = rounded_decoder(decoder, torch.bfloat16)
    for name, linear in rounded.named_modules():
        if isinstance(linear, nn.Linear) and (head or name not in KEPT):
            original = decoder.get_submodule(name).weight
            assert isinstance(original, Tensor)
            weight = quantization.weight(original, torch.bfloat16)
            linear.weight = nn.Parameter(weight.dequantized(), requires_grad=False)
            linear.register_forward_pre_hook(inputs)
    return rounded


def quantized_decoder(
    decoder: Decoder, narrow: NarrowType, calibration: Calibration, *, inputs: InputScales | None = None
) -> Decoder:
    """A copy whose linear layers have weights of few bits and, if asked for, inputs of few bits.

    Args:
        decoder: what to copy, often a `rounded_decoder`.
        narrow: the type of both.
        calibration: where it has a layer's `weight_amax`, that decides the scales.
        inputs: quantise the inputs too: "tensor" with the scales of the calibration, which then must have the
            `input_amax` of every layer, or "token" with the largest value of each token's own.
    """
    quantized = copy.deepcopy(decoder)
    for name, linear in quantized_linears(quantized).items():
        weight = quantize_weights(linear.weight, narrow, calibration.weight_amax.get(name))
        linear.weight = nn.Parameter(weight.dequantized(), requires_grad=False)
        if inputs is not None:
            amax = calibration.input_amax[name] if inputs == "tensor" else None
            linear.register_forward_pre_hook(_InputQuantizer(amax, narrow))
    return quantized


@dataclass(frozen=True, slots=True)
class _InputQuantizer:
    """Rounds a layer's input [T, k] as a kernel that takes few bits would; amax None is each token's own."""

    amax: float | None
    narrow: NarrowType

    def __call__(self, module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = arguments
        if self.amax is None:
            return (_by_token(x, self.narrow),)
        scale = self.amax / LARGEST[self.narrow]
        return (_narrowed(x / scale, self.narrow).float() * scale,)


def _by_token(x: Tensor, narrow: NarrowType) -> Tensor:
    """Rows [..., k] rounded to numbers of few bits, with one scale a row."""
    amax = x.abs().amax(-1, keepdim=True)
    scale = torch.where(amax > 0, amax / LARGEST[narrow], 1.0)
    return _narrowed(x / scale, narrow).float() * scale


def _narrowed(scaled: Tensor, narrow: NarrowType) -> Tensor:
    """Round to the nearest number of the type, ties to even; beyond its range, to its largest."""
    scaled = scaled.clamp(-LARGEST[narrow], LARGEST[narrow])
    return (scaled.round() if narrow == "int8" else scaled).to(DTYPES[narrow])
