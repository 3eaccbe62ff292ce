"""What config.json says about the decoder, read in full and checked, as one dataclass.

Options that change the computation and that the decoder does not implement are refused here, by name.
Options that an architecture does not know are ignored, as its reference implementation does. Defaults for
absent options are those of the `transformers` configuration classes of the four architectures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quire.errors import CheckpointError, UnsupportedModelError

RopeType = Literal["default", "linear", "llama3", "yarn"]

_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ROPE_OPTIONS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "original_max_position_embeddings",
            "truncate",
        }
    ),
}
_REFUSED_WHEN_SET = {
    "quantization_config": "quantised weights",
    "compression_config": "compressed weights",
    "auto_map": "model code that comes with the checkpoint",
    "num_experts": "mixture of experts",
    "num_local_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "attention_sinks": "attention sinks",
    "num_sink_tokens": "attention sinks",
    "sinks": "attention sinks",
    "attn_logit_softcapping": "soft-capped attention scores",
    "final_logit_softcapping": "soft-capped logits",
    "is_encoder_decoder": "an encoder",
    "add_cross_attention": "cross attention",
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding and how it is stretched; options of other types keep their defaults."""

    theta: float
    rope_type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    """Tokens; llama3 and yarn."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    """yarn: what cosines and sines are multiplied with; None derives it from the factor."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder of the LLaMA family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    """Bias of the attention's output projection."""
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over each head of the queries and keys, before RoPE."""
    sliding_windows: tuple[int | None, ...]
    """For each layer the number of positions that a query sees, itself included; None for all."""

    @property
    def max_context(self) -> int:
        """Positions for which the model is meant.

        yarn checkpoints are often published with the unstretched `max_position_embeddings`, so there the
        factor counts as well.
        """
        if self.rope.rope_type != "yarn":
            return self.max_position_embeddings
        stretched = int(self.rope.original_max_position_embeddings * self.rope.factor)
        return max(self.max_position_embeddings, stretched)

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that one token leaves in the KV pool, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a config.json.

        Raises:
            CheckpointError: an option is missing, has a wrong type, or contradicts another.
            UnsupportedModelError: the architecture or one of its options is not implemented.
        """
        architecture = _architecture(config)
        _refuse_unsupported(config)
        options = _Options(config)
        hidden_size, num_heads = options.size("hidden_size"), options.size("num_attention_heads")
        if architecture == "LlamaForCausalLM":
            num_kv_heads = options.size("num_key_value_heads", num_heads)
        else:
            num_kv_heads = options.size("num_key_value_heads")
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {num_heads} is not a multiple of "
                f"num_key_value_heads {num_kv_heads}"
            )
        default_head_dim = 128 if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads
        head_dim = options.size("head_dim", default_head_dim)
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim {head_dim} is odd; RoPE rotates pairs")
        attention_bias = options.flag("attention_bias") and architecture in (
            "LlamaForCausalLM",
            "Qwen3ForCausalLM",
        )
        num_layers = options.size("num_hidden_layers")
        return cls(
            architecture=architecture,
            vocab_size=options.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=options.size("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=options.number("rms_norm_eps", 1e-6),
            max_position_embeddings=options.size("max_position_embeddings"),
            rope=_rope(config),
            tie_word_embeddings=options.flag("tie_word_embeddings"),
            qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
            output_bias=attention_bias,
            mlp_bias=options.flag("mlp_bias") and architecture == "LlamaForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            sliding_windows=_sliding_windows(architecture, options, num_layers),
        )


class _Options:
    """Typed look-ups in a JSON object; `where` names it in messages."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = values
        self._where = where

    def get(self, name: str) -> Any:
        """The value, None when absent or null."""
        return self._values.get(name)

    def is_null(self, name: str) -> bool:
        """Whether the option is written as null, which absent options are not."""
        return name in self._values and self._values[name] is None

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self._where} has no {name}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self._where}: {name} is {value!r}; it must be a whole number of at least 1"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self._where} has no {name}")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise CheckpointError(f"{self._where}: {name} is {value!r}; it must be a number above 0")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self._where}: {name} is {value!r}; it must be true or false")
        return value


def _architecture(config: Mapping[str, Any]) -> str:
    supported = ", ".join(_MODEL_TYPES.values())
    architectures = config.get("architectures")
    if architectures is None:
        model_type = config.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise UnsupportedModelError(
                f"model_type {model_type!r} is not supported; supported are {supported}"
            )
        return _MODEL_TYPES[model_type]
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise UnsupportedModelError(
            f"architectures is {architectures!r}; it must name one of {supported}, and only that"
        )
    if architectures[0] not in _MODEL_TYPES.values():
        raise UnsupportedModelError(
            f"architecture {architectures[0]!r} is not supported; supported are {supported}"
        )
    return str(architectures[0])


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for name, what in _REFUSED_WHEN_SET.items():
        if config.get(name):
            raise UnsupportedModelError(f"config.json sets {name}: {what} is not supported")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(f"hidden_act {activation!r} is not supported; supported is 'silu'")
    if config.get("pretraining_tp") not in (None, 1):
        raise UnsupportedModelError(
            f"pretraining_tp is {config['pretraining_tp']!r}: weights split for tensor parallelism "
            "are not supported"
        )


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    parameters = _rope_parameters(config)
    rope_type: RopeType = parameters.get("rope_type", parameters.get("type", "default"))
    options, top_level = _Options(parameters, "config.json: rope_parameters"), _Options(config)
    theta = options.number("rope_theta", top_level.number("rope_theta", 10000.0))
    if rope_type == "default":
        return RopeConfig(theta)
    if rope_type == "linear":
        return RopeConfig(theta, "linear", factor=options.number("factor"))
    context = top_level.size("max_position_embeddings")
    original = top_level.size(
        "original_max_position_embeddings", options.size("original_max_position_embeddings", context)
    )
    if rope_type == "llama3":
        return RopeConfig(
            theta,
            "llama3",
            factor=options.number("factor"),
            original_max_position_embeddings=original,
            low_freq_factor=options.number("low_freq_factor"),
            high_freq_factor=options.number("high_freq_factor"),
        )
    overrides = {
        name: options.number(name)
        for name in ("attention_factor", "mscale", "mscale_all_dim")
        if parameters.get(name)
    }
    return RopeConfig(
        theta,
        "yarn",
        factor=options.number("factor", context / original),
        original_max_position_embeddings=original,
        beta_fast=options.number("beta_fast", 32.0),
        beta_slow=options.number("beta_slow", 1.0),
        truncate=options.flag("truncate", True),
        **overrides,
    )


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, called `rope_scaling` before transformers 5, with every option known."""
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise CheckpointError(f"config.json: rope_scaling is {parameters!r}; it must be an object")
    parameters = {name: value for name, value in parameters.items() if value is not None}
    if any(isinstance(value, dict) for value in parameters.values()):
        raise UnsupportedModelError("rope_parameters that differ between layers are not supported")
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in _ROPE_OPTIONS:
        raise UnsupportedModelError(
            f"rope_type {rope_type!r} is not supported; supported are {', '.join(_ROPE_OPTIONS)}"
        )
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UnsupportedModelError(
            f"partial_rotary_factor {partial!r} is not supported; the whole head is rotated"
        )
    general = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = sorted(parameters.keys() - general - _ROPE_OPTIONS[rope_type])
    if unknown:
        raise UnsupportedModelError(f"option {unknown[0]!r} of rope_type {rope_type!r} is not supported")
    return parameters


def _sliding_windows(architecture: str, options: _Options, num_layers: int) -> tuple[int | None, ...]:
    """Llama has none, Mistral the same in every layer, Qwen one from layer `max_window_layers` on."""
    if architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    if architecture == "MistralForCausalLM":
        window = None if options.is_null("sliding_window") else options.size("sliding_window", 4096)
        return (window,) * num_layers
    if not options.flag("use_sliding_window"):
        return (None,) * num_layers
    window = options.size("sliding_window", 4096)
    layer_types = options.get("layer_types")
    if layer_types is None:
        first = options.size("max_window_layers", 28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    windows = {"full_attention": None, "sliding_attention": window}
    for layer_type in layer_types:
        if layer_type not in windows:
            raise UnsupportedModelError(f"layer type {layer_type!r} is not supported")
    if len(layer_types) != num_layers:
        raise CheckpointError(
            f"config.json: layer_types names {len(layer_types)} layers, num_hidden_layers is {num_layers}"
        )
    return tuple(windows[layer_type] for layer_type in layer_types)
