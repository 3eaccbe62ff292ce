"""The projections of queries, keys and values, and their way into the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from quire_build.tensorrt.linear_tiles import LinearTile
from quire_build.tensorrt.operators.launch import MODEL, Arithmetic, Launch, Shape, in_order
from quire_build.tensorrt.operators.linear import Linear
from quire_build.tensorrt.operators.writes_kv import WritesKv


@dataclass(frozen=True)
class ProjectQkv(WritesKv):
    """A `Linear` that makes queries, keys and values: rotate, put keys and values into the pool.

    Inputs: those of `Linear` that it reads, weight [(num_heads + 2 * num_kv_heads) * head_dim, k]; cos_sin
    float32 [max_positions, head_dim]; positions, slot_mapping int32 [T]; kv_cache, the pool's first part;
    engine_state. The rows of weight and bias that make queries and keys are in the order of `in_pairs`.
    Outputs: queries [T, num_heads, head_dim], in that order; scratch and descriptors as those of `Linear`.
    """

    k: int
    normed: int
    epsilon: float
    biased: int
    weight_group: int
    weight_float: int
    narrow_rows: int
    shared_bytes: int
    multiprocessors: int

    INPUTS: ClassVar[tuple[str, ...]] = (
        "x",
        "weight",
        "squares",
        "bias",
        "scales",
        "narrow_x",
        "x_scales",
        "cos_sin",
        "positions",
        "slot_mapping",
        "kv_cache",
        "engine_state",
    )
    NUM_OUTPUTS: ClassVar[int] = 3

    @property
    def linear(self) -> Linear:
        """The product alone."""
        return Linear(
            k=self.k,
            n=self.width,
            normed=self.normed,
            epsilon=self.epsilon,
            gated=0,
            adds_residual=0,
            biased=self.biased,
            wide_output=0,
            weight_group=self.weight_group,
            weight_float=self.weight_float,
            narrow_rows=self.narrow_rows,
            shared_bytes=self.shared_bytes,
            multiprocessors=self.multiprocessors,
        )

    @property
    def tiles(self) -> tuple[LinearTile, ...]:
        """What TensorRT chooses from, one for each tactic."""
        return self.linear.tiles

    @property
    def num_tactics(self) -> int:
        """As many as there are tiles to choose from."""
        return len(self.tiles)

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """The rotated queries, scratch, descriptors."""
        *_, scratch, descriptors = self.linear.outputs(shapes)
        return ((shapes[0][0], self.num_heads, self.head_dim), MODEL), scratch, descriptors

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic, tactic: int = 0) -> Launch:
        """The product's launch."""
        return self.launch_in(self.tiles[tactic], shapes, arithmetic)

    def launch_in(self, tile: LinearTile, shapes: Sequence[Shape], arithmetic: Arithmetic) -> Launch:
        """The launch in tiles of the caller's choice, scratch being large enough."""
        launch = self.linear.launch_in(tile, shapes, arithmetic)
        absent = ("residual", "next_norm", "normed", "out_squares")
        own = {name: kind for name, kind in launch.types.items() if name not in absent}
        types = in_order(launch.kernel, own | self.kv_types)
        constants = {name: value for name, value in launch.constants.items() if name not in types}
        return replace(
            launch,
            types=types,
            constants=constants | dict.fromkeys(absent) | {"HEADS": self.heads},
            integers=(*launch.integers, self.layer),
        )
