"""The LLaMA family as one torch module: Llama, Qwen2 (biases), Qwen3 (normed queries and keys), Mistral.

It computes a packed batch over a paged KV cache, with the tensors and names of the engine contract. Where
parameters come from is `checkpoint`'s business; their names here are the checkpoint's, less `model.`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quire_build.decoder_config import DecoderConfig
from quire_build.paged_attention import paged_attention, paged_attention_in_place
from quire_build.rope import cosine_and_sine

StepMetadata = tuple[Tensor, Tensor, Tensor, Tensor]
"""slot_mapping, block_tables, query_start_loc, seq_lens: what attention needs in every layer."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """Any shape [..., size]."""
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with RoPE."""

    def __init__(self, config: DecoderConfig, sliding_window: int | None) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.sliding_window = sliding_window or 0
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm: nn.Module = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm: nn.Module = RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        cosine: Tensor,
        sine: Tensor,
        metadata: StepMetadata,
        key_cache: Tensor,
        value_cache: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attend: [T, hidden_size] in and out, with the caches after the write."""
        query = self.q_norm(self.q_proj(hidden).unflatten(-1, (self.num_heads, self.head_dim)))
        key = self.k_norm(self.k_proj(hidden).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        # What is traced must be a function of its inputs; what runs should not copy the pool.
        attend = paged_attention if torch.compiler.is_exporting() else paged_attention_in_place
        attended, key_cache, value_cache = attend(
            _rotate(query, cosine, sine).flatten(1),
            _rotate(key, cosine, sine).flatten(1),
            self.v_proj(hidden),
            key_cache,
            value_cache,
            *metadata,
            self.head_dim**-0.5,
            self.num_heads,
            self.num_kv_heads,
            self.sliding_window,
        )
        return self.o_proj(attended), key_cache, value_cache


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate dimension i of each head [T, heads, head_dim] with dimension i + head_dim / 2."""
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class SwiGLU(nn.Module):
    """The gated feed-forward network."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, hidden_size] in and out."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class Layer(nn.Module):
    """Attention and feed-forward network, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, sliding_window: int | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, sliding_window)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        hidden: Tensor,
        cosine: Tensor,
        sine: Tensor,
        metadata: StepMetadata,
        key_cache: Tensor,
        value_cache: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[T, hidden_size] in and out, with the caches after the write."""
        attended, key_cache, value_cache = self.self_attn(
            self.input_layernorm(hidden), cosine, sine, metadata, key_cache, value_cache
        )
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), key_cache, value_cache


class Decoder(nn.Module):
    """From token ids to logits.

    Args:
        config: what to build.
        num_positions: length of the RoPE tables; positions of a step must be below it.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, config: DecoderConfig, num_positions: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, window) for window in config.sliding_windows)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        cosine, sine = cosine_and_sine(config.rope, config.head_dim, num_positions)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        block_tables: Tensor,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        logits_indices: Tensor,
        key_caches: list[Tensor],
        value_caches: list[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run one step; shapes are those of the engine contract (`quire.execution.model_inputs`).

        `key_caches` and `value_caches` hold one pool for each layer, shaped as `paged_attention` says.

        Returns:
            float32 logits [N, vocab_size] of the rows in `logits_indices`, and the caches of every layer
            after the step.
        """
        hidden = self.embed_tokens(input_ids)
        # One axis for the heads.
        cosine = F.embedding(positions, self.cosine).unsqueeze(1)
        sine = F.embedding(positions, self.sine).unsqueeze(1)
        metadata = (slot_mapping, block_tables, query_start_loc, seq_lens)
        keys, values = [], []
        for layer, key_cache, value_cache in zip(self.layers, key_caches, value_caches, strict=True):
            hidden, key_cache, value_cache = layer(hidden, cosine, sine, metadata, key_cache, value_cache)
            keys.append(key_cache)
            values.append(value_cache)
        return self.lm_head(self.norm(hidden.index_select(0, logits_indices))), keys, values
