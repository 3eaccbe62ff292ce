"""Registers the operators with TensorRT as plugins whose kernels travel in the plan.

They are TensorRT's quick-deployable plugins with ahead-of-time kernels: the PTX is part of the plan, which
then needs no shared library and no Python to run. TensorRT passes each kernel its input pointers, then
integers it computes from the shapes, then its output pointers, and nulls for parameters beyond these. Two of
those the Triton language appends, the first for memory that it may want itself; an operator whose kernel does
want it has one output more than the kernel knows of.

The pool and the engine's state are ordinary inputs that kernels write through: no output aliases them,
because TensorRT may answer an alias with a copy. What orders writes before reads is that each operator
needs what the one before computed.
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
    own_types = {"fp32": trt.float32, "i32": trt.int32}
    elements = {trt.bfloat16: "bf16", trt.float16: "fp16", trt.float32: "fp32"}

    def describe(*descriptions: Any, **values: Any) -> tuple[Any, ...]:
        shapes = [description.shape_expr for description in descriptions]
        return tuple(
            trtp.from_shape_expr(shape, own_types.get(element, descriptions[0].dtype))
            for shape, element in operator(**values).outputs(shapes)
        )

    def offer(*arguments: Any) -> list[Any]:
        descriptions, values, outputs = arguments[: len(inputs)], arguments[len(inputs) : -1], arguments[-1]
        tactics = operator(**dict(zip(names, values, strict=True))).num_tactics
        types = ", ".join(description.dtype.name for description in (*descriptions, *outputs))
        # TensorRT wants tactics above 0.
        return [trtp.AutoTuneCombination(types, "LINEAR", list(range(1, tactics + 1)))]

    def implement(*arguments: Any) -> tuple[str, str, Any, Any]:
        descriptions, values = arguments[: len(inputs)], arguments[len(inputs) : -2]
        shapes = [description.shape_expr for description in descriptions]
        arithmetic, tactic = _SymbolicArithmetic(), arguments[-1]
        launch = operator(**dict(zip(names, values, strict=True))).launch(shapes, arithmetic, tactic - 1)
        model_type = elements.get(descriptions[0].dtype, "")
        kernel = compile_kernel(
            launch.kernel,
            {name: kind.replace(MODEL, model_type) for name, kind in launch.types.items()},
            launch.constants,
            arch=arch,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            max_registers=launch.max_registers,
            max_shared_bytes=launch.max_shared_bytes,
            language_scratch_bytes=launch.language_scratch_bytes,
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
    _sign(offer, [*own, ("outputs", outputs)], list[trtp.AutoTuneCombination])
    result = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    _sign(implement, [*own, ("outputs", outputs), ("tactic", int)], result)
    trtp.register(plugin)(describe)
    trtp.autotune(plugin)(offer)
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
