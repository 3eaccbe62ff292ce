"""The operators of a lowered graph, one file each; `plugins.py` registers them with TensorRT."""

from __future__ import annotations

from quire_build.tensorrt.operators.assign_splits import AssignSplits
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
from quire_build.tensorrt.operators.project_qkv import ProjectQkv
from quire_build.tensorrt.operators.quantize import Quantize
from quire_build.tensorrt.operators.sample import Sample
from quire_build.tensorrt.operators.step_begin import StepBegin
from quire_build.tensorrt.operators.writes_kv import in_pairs

OPERATORS: tuple[type[Operator], ...] = (
    StepBegin,
    AssignSplits,
    ProjectQkv,
    KvWrite,
    PagedAttend,
    Quantize,
    Linear,
    Sample,
)

__all__ = [
    "MODEL",
    "OPERATORS",
    "Arithmetic",
    "AssignSplits",
    "KvWrite",
    "Launch",
    "Linear",
    "Operator",
    "PagedAttend",
    "PlainArithmetic",
    "ProjectQkv",
    "Quantize",
    "Sample",
    "Shape",
    "StepBegin",
    "in_pairs",
    "power_of_two",
]
