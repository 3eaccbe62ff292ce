"""config.json is read in full, and what is not implemented is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from quire.errors import CheckpointError, UnsupportedModelError
from quire_build.decoder_config import DecoderConfig, RopeConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2}


def test_absent_options_take_the_defaults_of_the_architecture() -> None:
    llama = DecoderConfig.from_huggingface(LLAMA)
    assert (llama.num_kv_heads, llama.head_dim, llama.rms_norm_eps) == (4, 16, 1e-6)
    assert llama.rope == RopeConfig(theta=10000.0)
    assert not (llama.qkv_bias or llama.output_bias or llama.mlp_bias or llama.qk_norm)
    assert not llama.tie_word_embeddings
    qwen2 = DecoderConfig.from_huggingface(QWEN2)
    assert qwen2.qkv_bias and not qwen2.output_bias
    qwen3 = DecoderConfig.from_huggingface(QWEN3)
    assert qwen3.qk_norm and qwen3.head_dim == 128 and not qwen3.qkv_bias


def test_the_model_type_decides_where_no_architecture_is_named() -> None:
    config = {name: value for name, value in QWEN3.items() if name != "architectures"}
    assert DecoderConfig.from_huggingface({**config, "model_type": "qwen3"}).qk_norm


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({**LLAMA, "sliding_window": 8}, (None, None, None, None)),
        (MISTRAL, (4096,) * 4),
        ({**MISTRAL, "sliding_window": None}, (None,) * 4),
        ({**MISTRAL, "sliding_window": 8}, (8,) * 4),
        ({**QWEN2, "sliding_window": 8}, (None,) * 4),
        (
            {**QWEN2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
            (None, None, None, 8),
        ),
        (
            {
                **QWEN3,
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_each_layer_has_the_window_of_its_architecture(
    config: dict[str, Any], expected: tuple[int | None, ...]
) -> None:
    assert DecoderConfig.from_huggingface(config).sliding_windows == expected


def test_rope_scaling_is_read_in_its_old_and_its_new_form() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    new = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    expected = RopeConfig(5e5, "llama3", 8.0, original_max_position_embeddings=512)
    assert DecoderConfig.from_huggingface(old).rope == expected
    assert DecoderConfig.from_huggingface(new).rope == expected


def test_yarn_stretches_the_context_that_the_model_allows() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert DecoderConfig.from_huggingface({**LLAMA, "rope_scaling": yarn}).max_context == 2048
    assert DecoderConfig.from_huggingface(LLAMA).max_context == 512


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("architectures", ["GPT2LMHeadModel"]),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "awq"}),
        ("num_local_experts", 8),
        ("attention_sinks", True),
        ("pretraining_tp", 2),
        ("partial_rotary_factor", 0.5),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Model"}),
        ("rope_scaling", {"rope_type": "longrope", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        DecoderConfig.from_huggingface({**LLAMA, option: value})
    named = {
        "architectures": "LlamaForCausalLM",  # the message lists what is supported
        "rope_scaling": "rope_type",
    }.get(option, option)
    assert named in str(refusal.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hidden_size", None),
        ("num_hidden_layers", 0),
        ("vocab_size", "256"),
        ("num_attention_heads", True),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", 1),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("rope_scaling", "linear"),
        ("rope_theta", 0),
    ],
)
def test_a_malformed_option_is_refused_by_name(option: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=option):
        DecoderConfig.from_huggingface({**LLAMA, option: value})


def test_a_scaling_without_its_factor_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="factor"):
        DecoderConfig.from_huggingface({**LLAMA, "rope_scaling": {"rope_type": "linear"}})
