"""Numbers of few bits are the nearest there are, and a decoder of them is the one that an engine would be."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from quire.errors import BuildError
from quire.execution.manifest import EngineLimits, GateReport
from quire_build import gate, pipeline, quantization
from quire_build.calibration import calibrate
from quire_build.decoder import Decoder
from quire_build.decoder_config import DecoderConfig
from quire_build.gate import THRESHOLDS, compare, gate_workload
from quire_build.quantization import (
    LARGEST,
    PLANS,
    Calibration,
    NarrowType,
    plan_decoder,
    quantize_in_groups,
    quantize_weights,
    quantized_decoder,
    quantized_linears,
    rotated,
    rounded_decoder,
)
from quire_build.tensorrt.builder import TensorRTBuilder
from quire_build.torch_executor import TorchExecutor
from quire_build.workload import Workload

CONFIG = DecoderConfig.from_huggingface(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
    }
)
LIMITS = EngineLimits(max_num_seqs=8, max_num_batched_tokens=256, max_model_len=256)
BLOCK_SIZE = 32
LINEARS_PER_LAYER = 7
NARROW: tuple[NarrowType, ...] = ("int8", "fp8")


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(3)
    module = Decoder(CONFIG, CONFIG.max_context).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.2)
    return module


def _tokens(count: int) -> list[int]:
    return list(map(int, np.random.default_rng(2).integers(CONFIG.vocab_size, size=count)))


def _input_amax(decoder: Decoder, amax: float) -> Calibration:
    return Calibration(input_amax=dict.fromkeys(quantized_linears(decoder), amax))


def _errors(
    reference: Decoder, engine: Decoder, kv_dtype: torch.dtype = torch.float32
) -> tuple[float, float]:
    """Largest and mean |delta probability|."""
    workload = gate_workload(CONFIG.vocab_size, BLOCK_SIZE, LIMITS)
    report = compare(
        TorchExecutor(reference, CONFIG, workload.num_blocks, BLOCK_SIZE),
        TorchExecutor(engine, CONFIG, workload.num_blocks, BLOCK_SIZE, kv_dtype),
        workload,
        THRESHOLDS["bf16"],
    )
    return report.max_abs_probability_error, report.mean_abs_probability_error


@pytest.mark.parametrize("narrow", NARROW)
def test_every_number_is_the_nearest_that_its_channel_has(narrow: NarrowType) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 40) * torch.tensor([1e-4, 1e-2, 1.0, 3.0, 100.0, 0.0])[:, None]
    quantized = quantize_weights(weight.to(torch.bfloat16), narrow)
    weight = weight.to(torch.bfloat16).float()
    assert quantized.scales.shape == (6,) and quantized.scales.dtype == torch.float32
    if narrow == "int8":
        numbers = torch.arange(-127, 128).float()
    else:
        numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        numbers = numbers[numbers.isfinite()]
    nearest = (weight[..., None] - numbers * quantized.scales[:, None, None]).abs().amin(-1)
    torch.testing.assert_close((weight - quantized.dequantized()).abs(), nearest, rtol=1e-4, atol=1e-9)
    assert torch.equal(quantized.values.float().abs().amax(1)[:5], torch.full((5,), LARGEST[narrow]))
    assert torch.count_nonzero(quantized.dequantized()[5]) == 0
    # What a kernel multiplies is exact in bf16.
    assert torch.equal(quantized.values.to(torch.bfloat16).float(), quantized.values.float())


@pytest.mark.parametrize("narrow", NARROW)
def test_weights_beyond_a_given_amax_saturate(narrow: NarrowType) -> None:
    weight = torch.tensor([[4.0, -4.0, 1.0, 0.0]])
    quantized = quantize_weights(weight, narrow, torch.tensor([2.0]))
    expected = torch.tensor([[2.0, -2.0, 1.0, 0.0]])
    torch.testing.assert_close(quantized.dequantized(), expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("narrow", NARROW)
def test_groups_of_inputs_have_a_scale_of_their_own(
    narrow: NarrowType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 150)
    weight[:, 64:128] *= 100.0
    weight[3, :64] = 0.0
    quantized = quantize_in_groups(weight, narrow, torch.bfloat16)
    assert quantized.values.shape == (7, 150)
    assert quantized.scales.shape == (7, 3) and quantized.scales.dtype == torch.bfloat16
    # Each group of each channel is as it would be by itself, but for the rounding of its scale.
    for first, end in ((0, 64), (64, 128), (128, 150)):
        part = quantize_weights(weight[:, first:end], narrow)
        torch.testing.assert_close(quantized.scales[:, first // 64].float(), part.scales, rtol=2**-8, atol=0)
        step = quantized.dequantized()[:, first:end] - weight[:, first:end]
        bound = 0.6 * part.scales if narrow == "int8" else 20.0 * part.scales
        assert (step.abs() <= bound[:, None]).all()
    assert torch.count_nonzero(quantized.dequantized()[3, :64]) == 0
    # Rows are quantised some at a time.
    monkeypatch.setattr(quantization, "_ELEMENTS_AT_ONCE", 300)
    again = quantize_in_groups(weight, narrow, torch.bfloat16)
    assert torch.equal(again.values.float(), quantized.values.float())
    assert torch.equal(again.scales, quantized.scales)


def test_a_plan_of_int8_differs_less_with_groups_than_with_channels() -> None:
    """Wide layers, so that a channel has several groups; the output layer is quantised in a plan."""
    torch.manual_seed(4)
    config = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=256, head_dim=128)
    wide = Decoder(config, config.max_context).eval().requires_grad_(False)
    for parameter in wide.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.05)
    by_group = plan_decoder(wide, PLANS["int8-weights"])
    by_channel = quantized_decoder(wide, "int8", Calibration())
    assert not torch.equal(by_group.lm_head.weight, wide.lm_head.weight)
    assert torch.equal(by_group.embed_tokens.weight, wide.embed_tokens.weight.bfloat16().float())
    for name, linear in quantized_linears(wide).items():
        of_group, of_channel = (
            (other.get_parameter(f"{name}.weight") - linear.weight).square().mean()
            for other in (by_group, by_channel)
        )
        assert of_group < 0.8 * of_channel


def test_a_rotation_spreads_what_a_few_inputs_have_over_all() -> None:
    """Weights and inputs with a large input: int8 loses less rotated, and the product is what it was."""
    torch.manual_seed(5)
    weight, x = torch.randn(20, 512), torch.randn(30, 512)
    x[:, 7] *= 60.0
    weight[:, 300] *= 20.0
    plan = PLANS["int8"]
    assert (plan.rotation(512), plan.rotation(96), plan.rotation(7)) == (256, 32, 1)
    plain = quantize_weights(weight, "int8"), quantize_weights(x, "int8")
    turned = plan.weight(weight, torch.bfloat16)
    assert turned.scales.shape == (20, 1) and turned.values.dtype == torch.int8
    product = x @ weight.T
    off_plain = plain[1].dequantized() @ plain[0].dequantized().T - product
    off_turned = plan.input(x) @ turned.dequantized().T - product
    assert float(off_turned.norm()) < 0.3 * float(off_plain.norm())
    # A kernel multiplies the rotated ones, which nothing rotates back.
    rows = rotated(plan.input(x), 256)
    torch.testing.assert_close(
        rows @ (turned.values.float() * turned.scales.float()).T, off_turned + product, atol=1e-2, rtol=1e-4
    )


def test_a_plan_of_eight_bits_quantises_inputs_and_the_head(decoder: Decoder) -> None:
    bf16 = rounded_decoder(decoder, torch.bfloat16)
    for of_plan in PLANS.values():
        plan = plan_decoder(decoder, of_plan)
        assert not torch.equal(plan.lm_head.weight, bf16.lm_head.weight)
        _, error = _errors(bf16, plan)
        assert 1e-6 < error < 0.02


def test_a_plan_of_eight_bits_is_held_against_the_module_rounded_to_its_model_type(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that is exactly that module shows no difference; one of 16 bits is held against float32."""

    class Builder:
        reference_device = "cpu"
        kv_cache_dtypes = TensorRTBuilder.kv_cache_dtypes

        def executor(self, directory: Path, manifest: Any, workload: Workload) -> TorchExecutor:
            dtype = torch.float16 if manifest.precision == "fp16" else torch.bfloat16
            return TorchExecutor(
                rounded_decoder(decoder, dtype), CONFIG, workload.num_blocks, BLOCK_SIZE, dtype
            )

    monkeypatch.setattr(pipeline, "load_decoder", lambda source, length: copy.deepcopy(decoder))
    monkeypatch.setattr(gate, "NUM_NEW_TOKENS", 2)  # steps of one token take most of the time
    source: Any = SimpleNamespace(config=CONFIG)
    builder: Any = Builder()

    def report(precision: str, kv_cache_dtype: str) -> GateReport:
        manifest: Any = SimpleNamespace(
            limits=LIMITS,
            plan=None,
            block_size=BLOCK_SIZE,
            precision=precision,
            kv_cache_dtype=kv_cache_dtype,
        )
        return pipeline._measure(source, manifest, Path(), builder, None)

    for narrow in (*((name, "bf16") for name in PLANS), ("int8", "fp8"), ("bf16", "fp8"), ("fp16", "fp8")):
        assert report(*narrow).max_abs_logit_error == 0.0
    assert report("bf16", "bf16").max_abs_logit_error > 1e-4
    assert report("fp16", "fp16").max_abs_logit_error > 1e-5


def test_a_rounded_decoder_differs_by_roundings_and_leaves_the_original_alone(decoder: Decoder) -> None:
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    rounded = rounded_decoder(decoder, torch.bfloat16)
    largest, mean = _errors(decoder, rounded, torch.bfloat16)
    assert 1e-5 < mean < largest < 0.1
    assert _errors(decoder, rounded_decoder(decoder, torch.float32)) == (0.0, 0.0)
    assert all(torch.equal(before[name], value) for name, value in decoder.state_dict().items())


@pytest.mark.parametrize("narrow", NARROW)
def test_a_quantised_decoder_has_quantised_layers_and_the_head_as_it_was(
    decoder: Decoder, narrow: NarrowType
) -> None:
    quantized = quantized_decoder(decoder, narrow, Calibration())
    linears = quantized_linears(quantized)
    assert len(linears) == CONFIG.num_layers * LINEARS_PER_LAYER
    for name, original in quantized_linears(decoder).items():
        linear = linears[name]
        assert not torch.equal(linear.weight, original.weight)
        torch.testing.assert_close(linear.weight, original.weight, rtol=0.07, atol=0.01)
    assert torch.equal(quantized.lm_head.weight, decoder.lm_head.weight)
    assert torch.equal(quantized.embed_tokens.weight, decoder.embed_tokens.weight)


def test_inputs_are_rounded_to_the_calibrated_scale_and_saturate(decoder: Decoder) -> None:
    """With int8 and a largest value of 127 a layer sees whole numbers."""
    quantized = quantized_decoder(decoder, "int8", _input_amax(decoder, 127.0), inputs="tensor")
    linear = quantized_linears(quantized)["layers.0.mlp.down_proj"]
    seen = torch.zeros(1, CONFIG.intermediate_size)
    seen[0, :4] = torch.tensor([0.4, 2.6, -1000.0, 0.5])
    whole = torch.zeros(1, CONFIG.intermediate_size)
    whole[0, :4] = torch.tensor([0.0, 3.0, -127.0, 0.0])
    torch.testing.assert_close(linear(seen), torch.nn.functional.linear(whole, linear.weight))


def test_each_token_can_have_a_scale_of_its_own(decoder: Decoder) -> None:
    quantized = quantized_decoder(decoder, "int8", Calibration(), inputs="token")
    linear = quantized_linears(quantized)["layers.0.mlp.down_proj"]
    seen, rounded = torch.zeros(3, CONFIG.intermediate_size), torch.zeros(3, CONFIG.intermediate_size)
    seen[:2, :2] = torch.tensor([[127.0, 2.6], [1.27, 0.026]])
    rounded[:2, :2] = torch.tensor([[127.0, 3.0], [1.27, 0.03]])
    expected = torch.nn.functional.linear(rounded, linear.weight)
    torch.testing.assert_close(linear(seen), expected, rtol=1e-4, atol=1e-5)


def test_fewer_bits_cost_more(decoder: Decoder) -> None:
    coarse, fine = (
        _errors(decoder, quantized_decoder(decoder, "int8", _input_amax(decoder, amax), inputs="tensor"))[0]
        for amax in (1000.0, 8.0)
    )
    assert 0 < fine < coarse


def test_keys_and_values_of_eight_bits_differ_and_saturate(decoder: Decoder) -> None:
    largest, mean = _errors(decoder, decoder, torch.float8_e4m3fn)
    assert 1e-4 < mean < largest < 0.3
    huge = rounded_decoder(decoder, torch.float32)
    for name, linear in quantized_linears(huge).items():
        if name.endswith("v_proj"):
            linear.weight.mul_(1e6)
    assert all(math.isfinite(error) for error in _errors(huge, huge, torch.float8_e4m3fn))


@pytest.mark.parametrize("narrow", NARROW)
def test_modelopt_finds_the_largest_values_and_fake_quantises_to_the_same_numbers(
    decoder: Decoder, narrow: NarrowType
) -> None:
    modelopt = pytest.importorskip("modelopt.torch.quantization")
    tokens = _tokens(600)
    calibration = calibrate(decoder, CONFIG, tokens, narrow)
    linears = quantized_linears(decoder)
    assert calibration.weight_amax.keys() == calibration.input_amax.keys() == linears.keys()
    for name, linear in linears.items():
        torch.testing.assert_close(calibration.weight_amax[name], linear.weight.abs().amax(1))
        by_modelopt = quantize_weights(linear.weight, narrow, calibration.weight_amax[name])
        assert torch.equal(by_modelopt.dequantized(), quantize_weights(linear.weight, narrow).dequantized())
    shorter = calibrate(decoder, CONFIG, tokens[:256], narrow)
    assert all(shorter.input_amax[name] <= amax for name, amax in calibration.input_amax.items())

    name = "layers.1.mlp.gate_proj"
    ours = quantized_decoder(decoder, narrow, calibration, inputs="tensor").get_submodule(name)
    bits = 8 if narrow == "int8" else (4, 3)
    x = torch.randn(20, CONFIG.hidden_size)
    x *= calibration.input_amax[name] / x.abs().max()
    theirs = modelopt.quantize(
        torch.nn.Sequential(copy.deepcopy(decoder.get_submodule(name))),
        {
            "quant_cfg": [
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
                {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": bits, "axis": None}},
            ],
            "algorithm": "max",
        },
        lambda model: model(x),
    )
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)


def test_calibration_without_modelopt_says_how_to_get_it(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("modelopt", "modelopt.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BuildError, match=r"pip install 'quire\[quantize\]'"):
        calibrate(decoder, CONFIG, _tokens(100), "int8")
