"""The operators of a lowered graph, one file each; `plugins.py` registers them with TensorRT."""

from __future__ import annotations

from typing import Any

from quire_build.tensorrt.kernels.kv_write import kv_write
from quire_build.tensorrt.kernels.linear import linear
from quire_build.tensorrt.kernels.paged_attention import paged_attention
from quire_build.tensorrt.kernels.quantize import quantize
from quire_build.tensorrt.kernels.sample import sample
from quire_build.tensorrt.kernels.step_begin import step_begin
from quire_build.tensorrt.operators.kv_write import KvWrite
from quire_build.tensorrt.operators.launch import (
    MODEL,
    Arithmetic,
    Launch,
    Operator,
    PlainArithmetic,
    Shape,
    power_of_two,
)
from quire_build.tensorrt.operators.linear import Linear
from quire_build.tensorrt.operators.paged_attend import PagedAttend
from quire_build.tensorrt.operators.quantize import Quantize
from quire_build.tensorrt.operators.sample import Sample
from quire_build.tensorrt.operators.step_begin import StepBegin

OPERATORS: tuple[type[Operator], ...] = (StepBegin, KvWrite, PagedAttend, Quantize, Linear, Sample)
KERNELS: tuple[Any, ...] = (step_begin, kv_write, paged_attention, quantize, linear, sample)
"""What they launch."""

__all__ = [
    "KERNELS",
    "MODEL",
    "OPERATORS",
    "Arithmetic",
    "KvWrite",
    "Launch",
    "Linear",
    "Operator",
    "PagedAttend",
    "PlainArithmetic",
    "Quantize",
    "Sample",
    "Shape",
    "StepBegin",
    "power_of_two",
]
