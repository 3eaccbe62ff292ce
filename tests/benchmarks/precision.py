"""What each precision costs a checkpoint, by the numerics gate's measures: the table of docs/precision.md.

``python tests/benchmarks/precision.py [--checkpoint DIR] [--plans]`` prints JSON. Every row is the torch
module against itself, rounded as the row says; none is an engine. With --plans only what a plan can be, in
bf16, fp16 and eight bits; the other rows are calibrated, which needs ``pip install 'quire[quantize]'``.
"Scaled first" are weights that the kernels' largest tiles multiply with: rounded to bf16 with their scales.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import torch
from torch import nn

from quire.execution.manifest import EngineLimits, GateReport, Precision
from quire_build.calibration import calibrate
from quire_build.checkpoint import Checkpoint, load_decoder
from quire_build.decoder import Decoder
from quire_build.gate import THRESHOLDS, compare, describe, read_tokens, text_workload
from quire_build.quantization import (
    PLANS,
    Calibration,
    NarrowType,
    plan_decoder,
    quantized_decoder,
    rounded_decoder,
)
from quire_build.torch_executor import TorchExecutor

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "quire-small"
BLOCK_SIZE = 32
LIMITS = EngineLimits(max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=512)
Side = tuple[Decoder, torch.dtype]
"""A decoder, and what its keys and values are kept in."""
NARROW: tuple[NarrowType, ...] = ("int8", "fp8")


def sides(
    plain: Decoder, calibrations: Mapping[NarrowType, Calibration]
) -> Iterator[tuple[str, Precision, Side, Side]]:
    """Each row's name, the precision whose thresholds it is held to, reference and what is compared."""
    reference = (plain, torch.float32)
    bf16 = (rounded_decoder(plain, torch.bfloat16), torch.bfloat16)
    yield "bf16", "bf16", reference, bf16
    yield "fp16", "fp16", reference, (rounded_decoder(plain, torch.float16), torch.float16)
    for against, name in ((bf16, "bf16"), (reference, "float32")):
        for narrow, calibration in calibrations.items():
            for what, decoder in (
                ("weights", quantized_decoder(bf16[0], narrow, calibration)),
                (
                    "weights, inputs by tensor",
                    quantized_decoder(bf16[0], narrow, calibration, inputs="tensor"),
                ),
                ("weights, inputs by token", quantized_decoder(bf16[0], narrow, calibration, inputs="token")),
            ):
                yield f"{narrow} {what}, against {name}", narrow, against, (decoder, torch.bfloat16)
        yield f"fp8 KV, against {name}", "fp8", against, (bf16[0], torch.float8_e4m3fn)
        for precision, quantization in PLANS.items():
            what = "weights, inputs by token, as in a plan" if quantization.inputs else "weights in groups"
            for head in (False, True):
                decoder = plan_decoder(plain, quantization, head=head)
                row = f"{quantization.narrow} {what}{', head too' if head else ''}"
                yield f"{row}, against {name}", precision, against, (decoder, torch.bfloat16)
                if head and not quantization.inputs:
                    scaled_first = (with_rounded_weights(decoder), torch.bfloat16)
                    yield f"{row}, scaled first, against {name}", precision, against, scaled_first


def with_rounded_weights(decoder: Decoder) -> Decoder:
    """A copy whose linear layers have weights of bf16."""
    rounded = copy.deepcopy(decoder)
    for linear in rounded.modules():
        if isinstance(linear, nn.Linear):
            linear.weight = nn.Parameter(linear.weight.bfloat16().float(), requires_grad=False)
    return rounded


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--plans", action="store_true", help="only what a plan can be")
    options = parser.parse_args()
    directory: Path = options.checkpoint
    checkpoint = Checkpoint.open(directory)
    config = checkpoint.config
    plain = load_decoder(checkpoint, config.max_context)
    calibrations = {}
    if not options.plans:
        tokens = read_tokens(directory / "calibration.txt", directory)
        calibrations = {narrow: calibrate(plain, config, tokens, narrow) for narrow in NARROW}
    reports: dict[str, GateReport] = {}
    for name, precision, *both in sides(plain, calibrations):
        workload = text_workload(directory / "held-out.txt", directory, BLOCK_SIZE, LIMITS)
        reference, engine = (
            TorchExecutor(decoder, config, workload.num_blocks, BLOCK_SIZE, kv_dtype)
            for decoder, kv_dtype in both
        )
        reports[name] = compare(reference, engine, workload, THRESHOLDS[precision])
        print(name, describe(reports[name]), reports[name].exceeded, file=sys.stderr, flush=True)
    print(json.dumps({name: msgspec.to_builtins(report) for name, report in reports.items()}, indent=2))


if __name__ == "__main__":
    main()
