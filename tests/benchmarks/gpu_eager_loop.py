"""What a user has before serving anything: batch by batch through an eager loop, LLaMA-7B's shape in fp16.

    python tests/benchmarks/gpu_eager_loop.py OUT.json

32 prompts of 128 tokens, 128 tokens more for each, greedy, until the whole batch is done: transformers'
`generate` as it comes, and a plain torch loop whose keys and values grow by `torch.cat`. Random weights.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import Results
from torch import Tensor

BATCH, PROMPT_TOKENS, OUTPUT_TOKENS = 32, 128, 128
DTYPE = torch.float16
ROUNDS = 3

Generate = Callable[[Tensor, int], Tensor]
"""From prompts [batch, tokens] and how many tokens to add, to prompts and outputs."""


class PlainLlama:
    """LLaMA in some forty lines: no paging, no graph, nothing fused that torch does not fuse itself."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
        self.head_dim, self.eps = hidden // self.heads, config["rms_norm_eps"]
        kv = self.kv_heads * self.head_dim

        def weight(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=DTYPE, device="cuda").normal_(std=0.02)

        self.embedding, self.head = weight(vocab, hidden), weight(vocab, hidden)
        self.norm = torch.ones(hidden, dtype=DTYPE, device="cuda")
        names = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        names |= {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}
        self.layers = [
            {name: weight(*shape) for name, shape in names.items()}
            for _ in range(config["num_hidden_layers"])
        ]
        exponents = torch.arange(0, self.head_dim, 2, device="cuda") / self.head_dim
        self.frequencies = config.get("rope_theta", 10000.0) ** -exponents

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None] * self.frequencies
        cosine, sine = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

    def _forward(self, ids: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        batch, length = ids.shape
        past = cache[0][0].shape[2] if cache else 0
        positions = torch.arange(past, past + length, device="cuda")
        x = F.embedding(ids, self.embedding)
        for number, layer in enumerate(self.layers):
            normed = F.rms_norm(x, x.shape[-1:], self.norm, self.eps)
            query, key, value = (
                F.linear(normed, layer[name]).view(batch, length, -1, self.head_dim).transpose(1, 2)
                for name in ("q", "k", "v")
            )
            query, key = self._rotate(query, positions), self._rotate(key, positions)
            if past:
                key, value = torch.cat((cache[number][0], key), 2), torch.cat((cache[number][1], value), 2)
                cache[number] = key, value
            else:
                cache.append((key, value))
            attended = F.scaled_dot_product_attention(
                query, key, value, is_causal=length > 1, enable_gqa=True
            )
            x = x + F.linear(attended.transpose(1, 2).flatten(2), layer["o"])
            normed = F.rms_norm(x, x.shape[-1:], self.norm, self.eps)
            gated = F.silu(F.linear(normed, layer["gate"])) * F.linear(normed, layer["up"])
            x = x + F.linear(gated, layer["down"])
        return F.linear(F.rms_norm(x[:, -1:], x.shape[-1:], self.norm, self.eps), self.head)

    @torch.inference_mode()
    def generate(self, prompts: Tensor, num_tokens: int) -> Tensor:
        cache: list[tuple[Tensor, Tensor]] = []
        ids = given = prompts
        for _ in range(num_tokens):
            given = self._forward(given, cache).argmax(-1)
            ids = torch.cat((ids, given), 1)
        return ids


def transformers_generate(config: Mapping[str, Any]) -> Generate:
    """transformers' own loop with what it chooses by default, its weights made on the GPU.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {name: value for name, value in config.items() if name != "architectures"}
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device("cuda"):
            model: Any = LlamaForCausalLM(LlamaConfig(**options)).eval()
    finally:
        torch.set_default_dtype(torch.float32)

    @torch.inference_mode()
    def generate(prompts: Tensor, num_tokens: int) -> Tensor:
        mask = torch.ones_like(prompts)
        output: Tensor = model.generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return output

    return generate


def measure_eager_loops(results: Results, config: Mapping[str, Any]) -> dict[str, float]:
    """Tokens per second of each loop, by its name; the fastest of the rounds."""
    rates = {}
    loops: dict[str, Callable[[], Generate]] = {
        "transformers": lambda: transformers_generate(config),
        "plain": lambda: PlainLlama(config).generate,
    }
    for name, make in loops.items():
        try:
            generate = make()
        except ImportError as error:
            results.add(eager=name, skipped=str(error))
            continue
        prompts = torch.randint(config["vocab_size"], (BATCH, PROMPT_TOKENS), device="cuda")
        generate(prompts, 4)
        times = [_time_s(generate, prompts) for _ in range(ROUNDS)]
        rates[name] = BATCH * OUTPUT_TOKENS / min(times)
        results.add(
            eager=name, batch=BATCH, tokens_per_s=round(rates[name]), rounds_s=[round(s, 3) for s in times]
        )
        del generate
        gc.collect()
        torch.cuda.empty_cache()
    return rates


def _time_s(generate: Generate, prompts: Tensor) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    output = generate(prompts, OUTPUT_TOKENS)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if output.shape != (BATCH, PROMPT_TOKENS + OUTPUT_TOKENS):
        raise RuntimeError(f"the loop returned {list(output.shape)}")
    return seconds


if __name__ == "__main__":
    from gpu_plan import LLAMA_2_7B

    measure_eager_loops(Results(Path(sys.argv[1])), LLAMA_2_7B)
