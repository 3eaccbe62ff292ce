"""Numbers of few bits: what quantised weights, activations and KV are, and the decoder as they make it.

A weight [n, k] becomes int8 or float8 (e4m3). A kernel multiplies the narrow numbers, exact in bf16, and
scales its accumulator. Plans have int8 with one scale for each output channel n and `WEIGHT_GROUP` inputs;
one scale for the whole channel and float8 are here to be measured. Activations have one scale for the whole
tensor, found by calibration, or one for each token, found as it comes. The decoders made here compute in
float32 on numbers rounded as an engine of that precision rounds them: the numerics gate measures with them
what a precision costs, and holds a plan of int8 against a decoder rounded like it.
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

    def dequantized(self) -> Tensor:
        """float32 [n, k]."""
        scales = self.scales.float()
        if not self.group:
            return self.values.float() * scales[:, None]
        return self.values.float() * scales.repeat_interleave(self.group, 1)[:, : self.values.shape[1]]


@dataclass(frozen=True, slots=True)
class Calibration:
    """The largest absolute values that a decoder showed, by the names of its linear layers."""

    weight_amax: dict[str, Tensor] = field(default_factory=dict)
    """float32 [n], of each output channel."""
    input_amax: dict[str, float] = field(default_factory=dict)
    """Of the layer's whole input, over the calibration text."""


def narrow_type(precision: Precision) -> NarrowType | None:
    """Type of linear layers' weights in a precision; None where they are as wide as everything else."""
    return precision if precision == "int8" or precision == "fp8" else None


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
    weight: Tensor, narrow: NarrowType, scale_dtype: torch.dtype, group: int = WEIGHT_GROUP
) -> QuantizedWeight:
    """Quantise a weight [n, k], symmetric, each `group` inputs of an output channel by themselves.

    Some rows at a time, so that beside the weight and the result little memory is needed.

    Args:
        weight: any floating-point type.
        narrow: the type to quantise to.
        scale_dtype: of the scales. Numbers are chosen for the rounded scales, which so cost nothing.
        group: inputs that share a scale; the last group is shorter where it does not divide k.
    """
    n, k = weight.shape
    groups = -(-k // group)
    values = torch.empty(n, k, dtype=DTYPES[narrow], device=weight.device)
    scales = torch.empty(n, groups, dtype=scale_dtype, device=weight.device)
    rows = max(1, _ELEMENTS_AT_ONCE // k)
    for first in range(0, n, rows):
        part = weight[first : first + rows].float()
        padded = nn.functional.pad(part, (0, groups * group - k)).view(len(part), groups, group)
        scale = (padded.abs().amax(2) / LARGEST[narrow]).to(scale_dtype)
        scale[scale == 0] = 1.0
        narrowed = _narrowed(padded / scale.float()[:, :, None], narrow)
        values[first : first + rows] = narrowed.view(len(part), -1)[:, :k]
        scales[first : first + rows] = scale
    return QuantizedWeight(values, scales, group)


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


def plan_decoder(decoder: Decoder, narrow: NarrowType = "int8", *, head: bool = True) -> Decoder:
    """A copy that computes as a plan with weights of few bits does; plans have int8, and the head with it.

    Every linear layer has its weights in groups of inputs; everything else is rounded to bf16.

    Args:
        decoder: float32.
        narrow: the weights' type.
        head: quantise the output layer too.
    """
    rounded = rounded_decoder(decoder, torch.bfloat16)
    for name, linear in rounded.named_modules():
        if isinstance(linear, nn.Linear) and (head or name not in KEPT):
            original = decoder.get_submodule(name).weight
            assert isinstance(original, Tensor)
            weight = quantize_in_groups(original, narrow, torch.bfloat16)
            linear.weight = nn.Parameter(weight.dequantized(), requires_grad=False)
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
        amax = x.abs().amax(-1, keepdim=True) if self.amax is None else torch.tensor(self.amax)
        scale = torch.where(amax > 0, amax / LARGEST[self.narrow], 1.0)
        return (_narrowed(x / scale, self.narrow).float() * scale,)


def _narrowed(scaled: Tensor, narrow: NarrowType) -> Tensor:
    """Round to the nearest number of the type, ties to even; beyond its range, to its largest."""
    scaled = scaled.clamp(-LARGEST[narrow], LARGEST[narrow])
    return (scaled.round() if narrow == "int8" else scaled).to(DTYPES[narrow])
