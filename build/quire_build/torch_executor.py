"""The reference executor: the torch module over pools of its own, step by step in the caller's thread.

Slow and plain. The numerics gate and the tests hold the engines against it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quire.errors import EngineStepError
from quire.execution.executor import PoolInfo, StepOutput
from quire.execution.manifest import KvCacheDtype
from quire.execution.model_inputs import ModelInputs
from quire_build.decoder import Decoder
from quire_build.decoder_config import DecoderConfig


@dataclass(slots=True)
class FinishedStep:
    """A step that ran when it was submitted."""

    output: StepOutput | None
    error: EngineStepError | None = None

    def result(self, timeout_s: float) -> StepOutput:
        """Return the output at once, or raise what the step ended with."""
        if self.output is None:
            assert self.error is not None
            raise self.error
        return self.output


KV_DTYPES: Mapping[KvCacheDtype, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
"""Of the pool's elements, by their names in the manifest."""


class TorchExecutor:
    """Runs a decoder over `num_blocks` blocks of `block_size` tokens, the null block included.

    It runs where the decoder is. Keys and values are kept as `kv_dtype`; all arithmetic is float32.
    """

    max_in_flight = 1
    token_feedback = False

    def __init__(
        self,
        decoder: Decoder,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int,
        kv_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._decoder = decoder
        self._device = next(decoder.parameters()).device
        self._pool_info = PoolInfo(num_blocks=num_blocks, epoch=secrets.randbits(31))
        shape = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        self._key_caches = [
            torch.zeros(shape, dtype=kv_dtype, device=self._device) for _ in range(config.num_layers)
        ]
        self._value_caches = [
            torch.zeros(shape, dtype=kv_dtype, device=self._device) for _ in range(config.num_layers)
        ]

    def pool_info(self, timeout_s: float) -> PoolInfo:
        """The pool, which is there from the start."""
        return self._pool_info

    def submit(self, inputs: ModelInputs) -> FinishedStep:
        """Run the step."""
        try:
            logits = self._run(inputs)
        except (RuntimeError, IndexError) as error:
            return FinishedStep(None, EngineStepError(f"step {inputs.step} failed: {error}"))
        return FinishedStep(StepOutput(logits.numpy(), None, self._pool_info))

    def close(self) -> None:
        """Free the pool."""
        self._key_caches.clear()
        self._value_caches.clear()

    @torch.inference_mode()
    def _run(self, inputs: ModelInputs) -> Tensor:
        logits: Tensor
        logits, _, _ = self._decoder(
            self._tensor(inputs.input_ids),
            self._tensor(inputs.positions),
            self._tensor(inputs.slot_mapping),
            self._tensor(inputs.block_tables),
            self._tensor(inputs.query_start_loc),
            self._tensor(inputs.seq_lens),
            self._tensor(inputs.logits_indices),
            self._key_caches,
            self._value_caches,
        )
        return logits.cpu()

    def _tensor(self, values: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(values).to(self._device)
