"""LLaMA checkpoints of realistic sizes with random weights: speed does not depend on what a model knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HEAD_DIM = 64
SHAPES: dict[str, dict[str, int]] = {
    "15.7m": {
        "num_hidden_layers": 8,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
    "101m": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 16384,
    },
}
"""By millions of parameters; embedding and output matrix are not tied."""


def write_random_checkpoint(shape: str, directory: Path) -> None:
    """Write config.json, model.safetensors and a tokenizer that knows bytes only."""
    config = _config(SHAPES[shape])
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file(_weights(config), directory / "model.safetensors")
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer.json that knows bytes only."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def _config(shape: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **shape,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }


def _weights(config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Tensors under their names in a Hugging Face checkpoint; matrices are [outputs, inputs]."""
    rng = np.random.default_rng(7)
    hidden, ffn, vocab = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
    queries, keys = (config[f"num_{name}_heads"] * HEAD_DIM for name in ("attention", "key_value"))

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(columns**-0.5)

    weights = {
        "model.embed_tokens.weight": matrix(vocab, hidden),
        "lm_head.weight": matrix(vocab, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": np.ones(hidden, np.float32),
            f"{prefix}.self_attn.q_proj.weight": matrix(queries, hidden),
            f"{prefix}.self_attn.k_proj.weight": matrix(keys, hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(keys, hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, queries),
            f"{prefix}.post_attention_layernorm.weight": np.ones(hidden, np.float32),
            f"{prefix}.mlp.gate_proj.weight": matrix(ffn, hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(ffn, hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(hidden, ffn),
        }
    return weights
