"""What a plan has besides our own operators, built by a real TensorRT API on a machine without a GPU.

TensorRT-RTX builds engines without a GPU, but its networks take no plugins. So each of our operators is cut
out: what it reads becomes an output, what it makes an input. The rest (gathers, casts, sums of squares,
weights, shapes, profiles) is what `NetworkWriter` writes.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("tensorrt_rtx_bindings")
pytest.importorskip("triton")

import tensorrt_rtx_bindings as trt

from quire.execution.manifest import EngineLimits
from quire_build.decoder import Decoder
from quire_build.decoder_config import DecoderConfig, RopeConfig
from quire_build.export import export_graph
from quire_build.tensorrt import operators, plan
from quire_build.tensorrt.lowering import lower
from quire_build.tensorrt.network import NetworkWriter
from quire_build.tensorrt.plan import PlanOptions

BLOCK_SIZE, NUM_POSITIONS = 8, 64
CONFIG = DecoderConfig(
    architecture="LlamaForCausalLM", vocab_size=48, hidden_size=64, intermediate_size=80, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=NUM_POSITIONS,
    rope=RopeConfig(theta=10000.0), tie_word_embeddings=False, qkv_bias=False, output_bias=False,
    mlp_bias=False, qk_norm=False, sliding_windows=(None, None),
)  # fmt: skip
OPTIONS = PlanOptions(
    dtype=torch.bfloat16,
    kv_dtype=torch.bfloat16,
    limits=EngineLimits(max_num_seqs=8, max_num_batched_tokens=32, max_model_len=NUM_POSITIONS),
    block_size=BLOCK_SIZE,
    kv_bytes_per_block=CONFIG.kv_elements_per_token * BLOCK_SIZE * 2,
    pool_bytes=1 << 20,
)


class CutNetwork:
    """A network whose plugins are cut out; everything else is the real one's."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.made: list[Any] = []
        """What plugins make, as inputs."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def add_plugin(self, plugin: tuple[type, list[Any], dict[str, Any]], aot: bool) -> Any:
        assert aot
        operator, inputs, attributes = plugin
        for read in inputs:
            if not read.is_network_input and not read.is_network_output:
                self.network.mark_output(read)
        shapes = [tuple(tensor.shape) for tensor in inputs]
        types = {"fp32": trt.float32, "i32": trt.int32}
        outputs = []
        for shape, element in operator(**attributes).outputs([_known(shape) for shape in shapes]):
            name = f"made.{len(self.made)}"
            # Any number of rows, the other sizes as the operator says.
            declared = (-1, *shape[1:]) if len(shape) > 1 else (-1,)
            outputs.append(self.network.add_input(name, types.get(element, inputs[0].dtype), declared))
            self.made.append(outputs[-1])
        return SimpleNamespace(get_output=outputs.__getitem__, name="")


def _known(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(4 if size < 0 else size for size in shape)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX under TensorRT's name, with plugins that only say what they are."""

    def describe(operator: type) -> Any:
        return lambda *inputs, **attributes: (operator, list(inputs), attributes)

    module = ModuleType("tensorrt")
    module.__dict__.update(trt.__dict__)
    plugins: Any = ModuleType("tensorrt.plugin")
    own = {operator.__name__: describe(operator) for operator in operators.OPERATORS}
    plugins.op = SimpleNamespace(quire=SimpleNamespace(**own))
    module.__dict__["plugin"] = plugins
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugins)


@pytest.mark.usefixtures("tensorrt")
def test_what_is_not_ours_builds_for_every_profile() -> None:
    model = export_graph(CONFIG, BLOCK_SIZE, NUM_POSITIONS)
    lower(model)
    decoder = Decoder(CONFIG, NUM_POSITIONS)
    weights = decoder.state_dict() | dict(decoder.named_buffers())
    builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    network = CutNetwork(builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)))
    writer = NetworkWriter(
        network,
        model,
        weights.__getitem__,
        dtype=OPTIONS.dtype,
        kv_dtype=OPTIONS.kv_dtype,
        multiprocessors=1,
        pool=OPTIONS.pool,
        max_num_seqs=OPTIONS.limits.max_num_seqs,
    )
    writer.write()
    kinds = {network.get_layer(number).type for number in range(network.num_layers)}
    layer = trt.LayerType
    assert {layer.GATHER, layer.CAST, layer.ELEMENTWISE, layer.SHUFFLE, layer.REDUCE, layer.CONSTANT} <= kinds
    config = builder.create_builder_config()
    config.max_aux_streams = 0
    ranges = plan.profile_ranges(OPTIONS.limits)
    for tokens in ranges:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in plan.step_shapes(OPTIONS, OPTIONS.pool, tokens).items():
            profile.set_shape(name, smallest, usual, largest)
        for made in network.made:
            smallest, largest = (tuple(n if size < 0 else size for size in made.shape) for n in tokens)
            profile.set_shape(made.name, smallest, largest, largest)
        assert config.add_optimization_profile(profile) >= 0
    assert builder.build_serialized_network(network.network, config) is not None
