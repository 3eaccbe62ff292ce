"""The angles of rotary position embeddings, plain and stretched.

Rotation itself is the decoder's; here are the inverse frequencies of each pair of dimensions and the tables
of cosines and sines made from them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quire_build.decoder_config import RopeConfig


def cosine_and_sine(rope: RopeConfig, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """Tables for positions 0 to `num_positions` - 1: two float32 tensors [num_positions, head_dim / 2]."""
    # On the CPU by name: the decoder is constructed under the meta device.
    positions = torch.arange(num_positions, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
    factor = _attention_factor(rope)
    return angles.cos() * factor, angles.sin() * factor


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each rotated pair: float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, frequencies)
    if rope.rope_type == "yarn":
        return _yarn(rope, frequencies)
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    context = rope.original_max_position_embeddings
    kept_share = (context / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    kept_share = kept_share.clamp(0.0, 1.0)
    return (1 - kept_share) * frequencies / rope.factor + kept_share * frequencies


def _yarn(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """YaRN (Peng et al., 2023, section 3.2): interpolation where a pair turns less than `beta_slow` times.

    Pairs that turn more than `beta_fast` times within the original context are kept, a linear ramp over the
    pairs lies between.
    """
    head_dim = 2 * frequencies.shape[0]

    def pair_that_turns(rotations: float) -> float:
        wavelength = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    interpolated_share = ((pairs - low) / width).clamp(0.0, 1.0)
    return interpolated_share * frequencies / rope.factor + (1 - interpolated_share) * frequencies


def _attention_factor(rope: RopeConfig) -> float:
    """What YaRN multiplies cosines and sines with, 1 for the others."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
    return _yarn_scale(rope.factor, 1.0)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
