"""GPU memory that a hosted plan takes besides its weights and its pool.

Triton's TensorRT backend makes an execution context for each optimization profile, and each context has
activation memory of its own, every one for the largest step of all profiles. Outputs are allocated once, at
their largest.
"""

from __future__ import annotations

from quire.execution.manifest import EngineLimits
from quire_build.decoder_config import DecoderConfig
from quire_build.tensorrt.plan import profile_ranges

SERVER_BYTES = 3 << 29
"""CUDA itself, kernels and their graphs, and the buffers of Triton: 0.7 GiB of a small plan on an H100."""
SCRATCH_BYTES = 128 << 20
"""What a context's kernels share for splits and for candidates of sampling, at most."""
LOGIT_BYTES = 4


def host_reserve_bytes(config: DecoderConfig, limits: EngineLimits, element_bytes: int) -> int:
    """What has to be left free for a plan that Triton hosts.

    Args:
        config: of the model.
        limits: its largest step.
        element_bytes: of an activation.
    """
    contexts = len(profile_ranges(limits)) * activation_bytes(config, limits, element_bytes)
    return SERVER_BYTES + contexts + limits.max_num_seqs * config.vocab_size * LOGIT_BYTES


def activation_bytes(config: DecoderConfig, limits: EngineLimits, element_bytes: int) -> int:
    """Activation memory of one context, as if all tensors of one layer were needed at the same time.

    TensorRT takes less: what is computed early makes room for what is computed late.
    """
    query = config.num_heads * config.head_dim
    qkv = query + 2 * config.num_kv_heads * config.head_dim
    # The residual stream before and after, what is normed of it; qkv, the query and what it attended to.
    per_token = 3 * config.hidden_size + qkv + 2 * query + config.intermediate_size
    return SCRATCH_BYTES + limits.max_num_batched_tokens * per_token * element_bytes
