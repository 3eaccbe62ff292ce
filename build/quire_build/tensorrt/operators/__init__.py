"""The operators of a lowered graph, one file each; `plugins.py` registers them with TensorRT."""

from __future__ import annotations

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

__all__ = [
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
