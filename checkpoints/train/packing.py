"""The corpus as one long row of token ids, made by all processor cores, and windows cut from it."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

import corpus
from tokenizer import EOS_ID

_SHARD = 1000  # documents that a worker process makes at a time


@dataclass
class Packed:
    """Documents one after the other, each ``<|bos|> text <|eos|>``.

    ``ids`` is int16 [tokens]; ``starts`` is int64 [documents], the places where a window may begin.
    """

    ids: torch.Tensor
    starts: torch.Tensor

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        return Packed(self.ids.to(device), self.starts.to(device))

    def windows(self, count: int, length: int) -> torch.Tensor:
        """Random windows, int64 [count, length], from the start of a document on into the next ones."""
        chosen = self.starts[torch.randint(len(self.starts), (count,), device=self.starts.device)]
        return self.ids[chosen[:, None] + torch.arange(length, device=chosen.device)].long()


def pack(tokenizer: Tokenizer, first_seed: int, documents: int, window: int) -> Packed:
    """Write and tokenize ``documents`` texts, from ``first_seed`` on, for windows of ``window`` tokens."""
    shards = [
        range(seed, min(seed + _SHARD, first_seed + documents))
        for seed in range(first_seed, first_seed + documents, _SHARD)
    ]
    with multiprocessing.get_context("fork").Pool() as pool:
        rows = [row for shard in pool.map(partial(_encode, tokenizer.to_str()), shards) for row in shard]
    lengths = np.array([len(row) for row in rows])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    fitting = starts[starts + window <= lengths.sum()]
    return Packed(torch.from_numpy(np.concatenate(rows)), torch.from_numpy(fitting))


def _encode(serialized: str, seeds: range) -> list[NDArray[np.int16]]:
    tokenizer = Tokenizer.from_str(serialized)
    texts = [corpus.document(seed) for seed in seeds]
    return [np.array([*encoding.ids, EOS_ID], np.int16) for encoding in tokenizer.encode_batch(texts)]
