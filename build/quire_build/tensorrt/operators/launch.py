"""What an operator of a lowered graph is: its outputs, and the launch that given input shapes ask for.

Sizes may be plain integers, as the tests run them in the Triton language's interpreter, or TensorRT's
symbolic ones, which a plan evaluates at every step: hence the arithmetic is handed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES

MODEL = "model"
"""Stands for the element type that weights and activations share, and the pool unless it is of e4m3."""

Shape = Sequence[Any]
"""Sizes, plain or symbolic."""


class Arithmetic(Protocol):
    """What sizes need beyond the operators +, - and // with an integer on the right."""

    def constant(self, value: int) -> Any:
        """A size that does not depend on the step."""

    def larger(self, first: Any, second: int) -> Any:
        """The larger of the two."""

    def ceil_div(self, first: Any, second: int) -> Any:
        """``first / second``, rounded up."""


class PlainArithmetic:
    """`Arithmetic` on Python's integers."""

    def constant(self, value: int) -> int:
        """``value`` itself."""
        return value

    def larger(self, first: int, second: int) -> int:
        """The larger of the two."""
        return max(first, second)

    def ceil_div(self, first: int, second: int) -> int:
        """``first / second``, rounded up."""
        return -(-first // second)


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: a ``triton.jit`` function; its parameters are the operator's inputs, integers and outputs, but
            for those that `constants` sets.
        types: of those parameters, in the Triton language's words, MODEL where the model's type belongs.
        constants: its ``constexpr`` parameters, and None for each other parameter that does not exist here.
        grid: programs along each axis.
        integers: its integer parameters.
        max_registers: of a thread; the compiler's own choice where None.
        max_shared_bytes: shared memory of a program, at most.
        language_scratch_bytes: memory of the GPU for a program that the language itself may ask for. It gets
            the operator's last output, behind the kernel's own parameters.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    grid: tuple[Any, ...]
    integers: tuple[Any, ...]
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None
    max_shared_bytes: int = DEFAULT_SHARED_BYTES
    language_scratch_bytes: int = 0

    def arguments(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, Any]:
        """The kernel's own arguments by name."""
        return dict(zip(self.types, [*inputs, *self.integers, *outputs], strict=False))


class Operator(Protocol):
    """An operator with its attributes: dataclass fields of type int or float."""

    INPUTS: ClassVar[tuple[str, ...]]
    NUM_OUTPUTS: ClassVar[int]

    @property
    def num_tactics(self) -> int:
        """Ways to compute it, each right for every shape; TensorRT keeps one for each profile."""

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """Shape and element type (MODEL, "fp32" or "i32") of each output, given the inputs' shapes."""

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic, tactic: int = 0) -> Launch:
        """The launch for inputs of these shapes in one of the ways."""


def pool_type(kv_element_bytes: int) -> str:
    """Type of the pool's elements; with one byte they are e4m3."""
    return "fp8e4nv" if kv_element_bytes == 1 else MODEL


def in_order(kernel: Any, types: Mapping[str, str]) -> dict[str, str]:
    """Types of a kernel's parameters, in the order of its signature."""
    return {name: types[name] for name in kernel.arg_names if name in types}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()
