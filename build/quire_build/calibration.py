"""Calibration by NVIDIA ModelOpt: which absolute values a decoder's weights and activations reach.

ModelOpt inserts its quantisers into a copy of the decoder and watches a calibration text go through; what it
found is all that is taken from it. Its package is heavy and only needed here.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Sequence
from typing import Any

from quire.errors import BuildError
from quire_build.decoder import Decoder
from quire_build.decoder_config import DecoderConfig
from quire_build.quantization import Calibration, NarrowType, quantized_linears
from quire_build.torch_executor import TorchExecutor
from quire_build.workload import Workload

INSTALL_HINT = "install it with `pip install 'quire[quantize]'`"
SEQUENCE_LENGTH = 512
"""Tokens of the text that go through the decoder as one sequence."""
BLOCK_SIZE = 32
NUM_BITS: dict[NarrowType, int | tuple[int, int]] = {"int8": 8, "fp8": (4, 3)}
"""As ModelOpt writes types: bits of an integer, or of exponent and mantissa."""


def calibrate(
    decoder: Decoder, config: DecoderConfig, token_ids: Sequence[int], narrow: NarrowType
) -> Calibration:
    """The largest values over a text; the decoder stays as it is.

    Args:
        decoder: float32.
        config: the decoder's.
        token_ids: the calibration text; a few thousand tokens of what the model will be used for.
        narrow: the type that will be quantised to.

    Raises:
        BuildError: ModelOpt is not installed, or a layer saw nothing but zeros or what is no number.
    """
    try:
        from modelopt.torch import quantization  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        raise BuildError(f"calibration needs the package {error.name}; {INSTALL_HINT}") from error

    linears = quantized_linears(decoder)
    quantizers: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in linears:
        for kind, axis in (("weight", 0), ("input", None)):
            cfg = {"num_bits": NUM_BITS[narrow], "axis": axis}
            quantizers.append({"quantizer_name": f"{name}.{kind}_quantizer", "cfg": cfg, "enable": True})
    with contextlib.redirect_stdout(sys.stderr):  # ModelOpt reports there
        watched = quantization.quantize(
            copy.deepcopy(decoder),
            {"quant_cfg": quantizers, "algorithm": "max"},
            lambda model: _read(model, config, token_ids),
        )
    layers = {name: watched.get_submodule(name) for name in linears}
    calibration = Calibration(
        weight_amax={name: layer.weight_quantizer.amax.flatten().float() for name, layer in layers.items()},
        input_amax={name: float(layer.input_quantizer.amax) for name, layer in layers.items()},
    )
    for name, amax in calibration.input_amax.items():
        if not 0 < amax < float("inf"):
            raise BuildError(f"calibration: the inputs of {name} reach {amax} on this text")
    return calibration


def _read(decoder: Decoder, config: DecoderConfig, token_ids: Sequence[int]) -> None:
    """Let the decoder compute the text, sequence after sequence."""
    length = min(SEQUENCE_LENGTH, config.max_context)
    starts = range(0, max(len(token_ids) - length, 0) + 1, length)
    workload = Workload(
        [token_ids[start : start + length - 1] for start in starts],
        num_new_tokens=1,
        block_size=BLOCK_SIZE,
        max_num_seqs=1,
        max_num_batched_tokens=length,
        chunk=length,
        continuations=[token_ids[start + length - 1 : start + length] or [0] for start in starts],
        max_logits_rows=1,
    )
    executor = TorchExecutor(decoder, config, workload.num_blocks, BLOCK_SIZE)
    while (inputs := workload.next_step()) is not None:
        logits = executor.submit(inputs).result(0.0).logits
        assert logits is not None
        workload.advance(logits)
