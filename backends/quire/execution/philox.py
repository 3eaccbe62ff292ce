"""Philox4x32-10: a random number that is a pure function of a seed and a position.

A counter-based generator keeps no state, so a request draws the same numbers alone or in a batch, after a
preemption and after a restart, on every executor. Which seed and which position is the caller's choice.

Algorithm and constants: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_KEY_INCREMENTS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_KEYS_FROM_FIRST = np.arange(ROUNDS, dtype=np.uint64)[:, None, None] * _KEY_INCREMENTS
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Encrypt N counters, each under its own key.

    Args:
        counter: [4, N], 32-bit words in 64-bit integers.
        key: [2, N], likewise.

    Returns:
        [4, N], likewise.
    """
    # Words 0 and 2 are multiplied, 1 and 3 are mixed in: both pairs go through a round together. A step's
    # numbers are few, so what counts is how often numpy is called: the halves of a product are views.
    multiplied, mixed = counter[0::2].astype(np.uint32), counter[1::2].astype(np.uint32)
    products = np.empty((2, *multiplied.shape), dtype="<u8")
    words = products.view("<u4")
    for round_number, round_key in enumerate((key + _KEYS_FROM_FIRST).astype(np.uint32)):
        turn = round_number % 2  # `mixed` still is a view of the other one
        np.multiply(multiplied, _MULTIPLIERS, out=products[turn])
        multiplied = words[turn, ::-1, 1::2] ^ mixed
        multiplied ^= round_key
        mixed = words[turn, ::-1, 0::2]
    encrypted = np.empty(counter.shape, dtype=np.uint64)
    encrypted[0::2], encrypted[1::2] = multiplied, mixed
    return encrypted


def uniforms(seeds: NDArray[np.uint64], output_indices: NDArray[np.int64]) -> NDArray[np.float32]:
    """One number in [0, 1) for each of N tokens.

    The key is the seed's low word and the sample number, which is 0 as long as a request has one sample;
    the counter is the output index, the seed's high word, 0 and 0. The upper 24 bits of the first word of
    the result, as many as a float32 holds exactly, make the number.

    Args:
        seeds: [N] of the requests.
        output_indices: [N] how many tokens each request's output already has.
    """
    counter, key = np.zeros((4, len(seeds)), np.uint64), np.zeros((2, len(seeds)), np.uint64)
    counter[0], counter[1] = output_indices, seeds >> _WORD_BITS
    key[0] = seeds & _LOW_WORD
    upper_bits = philox4x32(counter, key)[0] >> np.uint64(8)
    numbers: NDArray[np.float32] = upper_bits.astype(np.float32) * np.float32(2**-24)
    return numbers
