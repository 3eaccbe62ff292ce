"""Registers the operators with TensorRT as plugins whose kernels travel in the plan.

They are TensorRT's quick-deployable plugins with ahead-of-time kernels: the PTX is part of the plan, which
then needs no shared library and no Python to run. TensorRT passes each kernel its input pointers, then
integers it computes from the shapes, then its output pointers, and nulls for the parameters that the Triton
language appends.

The pool is an ordinary input that `KvWrite` writes through: no output aliases it, because TensorRT may answer
an alias with a copy. What orders the writes before the reads is that `PagedAttend` needs the queries that
`KvWrite` rotates.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from typing import Any

from quire_build.tensorrt.kernels.compiled import compile_kernel
from quire_build.tensorrt.operators import MODEL, OPERATORS, Operator

NAMESPACE = "quire"


@functools.cache
def register_plugins(arch: int) -> None:
    """Make every operator known to TensorRT in this process, as ``quire::<its name>``.

    Args:
        arch: compute capability that the kernels are compiled for, 90 for 9.0.
    """
    for operator in OPERATORS:
        _register(operator, arch)


def _register(operator: type[Operator], arch: int) -> None:
    import tensorrt as trt
    import tensorrt.plugin as trtp

    plugin = f"{NAMESPACE}::{operator.__name__}"
    inputs = operator.INPUTS
    attributes = typing.get_type_hints(operator)
    names = [field.name for field in dataclasses.fields(operator)]  # type: ignore[arg-type]
    elements = {trt.bfloat16: "bf16", trt.float16: "fp16", trt.float32: "fp32"}

    def describe(*descriptions: Any, **values: Any) -> tuple[Any, ...]:
        shapes = [description.shape_expr for description in descriptions]
        return tuple(
            trtp.from_shape_expr(shape, descriptions[0].dtype if element == MODEL else trt.float32)
            for shape, element in operator(**values).outputs(shapes)
        )

    def implement(*arguments: Any) -> tuple[str, str, Any, Any]:
        descriptions, values = arguments[: len(inputs)], arguments[len(inputs) : -2]
        shapes = [description.shape_expr for description in descriptions]
        launch = operator(**dict(zip(names, values, strict=True))).launch(shapes, _SymbolicArithmetic())
        types = {
            name: kind.replace(MODEL, elements[descriptions[0].dtype]) for name, kind in launch.types.items()
        }
        kernel = compile_kernel(
            launch.kernel,
            types,
            launch.constants,
            arch=arch,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
        params = trtp.KernelLaunchParams()
        for axis, extent in zip(("grid_x", "grid_y", "grid_z"), launch.grid, strict=False):
            setattr(params, axis, extent)
        params.block_x = kernel.threads
        params.shared_mem = kernel.shared_bytes
        integers = trtp.SymIntExprs(len(launch.integers))
        for i, value in enumerate(launch.integers):
            integers[i] = trtp.SymInt32(value)
        return kernel.name, kernel.ptx, params, integers

    # TensorRT learns a plugin's inputs and attributes from the signatures of its functions.
    own = [(name, trtp.TensorDesc) for name in inputs] + [(name, attributes[name]) for name in names]
    outputs = tuple.__class_getitem__((trtp.TensorDesc,) * operator.NUM_OUTPUTS)
    _sign(describe, own, outputs)
    result = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    _sign(implement, [*own, ("outputs", outputs), ("tactic", int)], result)
    trtp.register(plugin)(describe)
    trtp.aot_impl(plugin)(implement)


def _sign(function: Any, parameters: list[tuple[str, Any]], result: Any) -> None:
    """Give a function the signature that TensorRT is to read from it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters],
        return_annotation=result,
    )


class _SymbolicArithmetic:
    """`Arithmetic` on TensorRT's shape expressions."""

    def constant(self, value: int) -> Any:
        """An expression, so that it can stand left of an operator."""
        import tensorrt.plugin as trtp

        return trtp.ShapeExpr(value)

    def larger(self, first: Any, second: int) -> Any:
        """The larger of the two."""
        import tensorrt.plugin as trtp

        return trtp.max(first, second)

    def ceil_div(self, first: Any, second: int) -> Any:
        """``first / second``, rounded up."""
        import tensorrt.plugin as trtp

        return trtp.cdiv(first, second)
