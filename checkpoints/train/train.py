"""Makes the small checkpoint: writes the corpus, learns the tokenizer, trains the model, saves and checks it.

``python checkpoints/train/train.py --out checkpoints/quire-small`` remakes it. The learning rate follows the
share of ``--minutes`` that has passed, so a slower machine does fewer steps and still comes to a proper end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import corpus
from model import CausalLM, Shape
from packing import Packed, pack
from tokenizer import BOS, BOS_ID, EOS, EOS_ID, learn

_HELD_OUT = 1_000_000_000  # seeds from here on are never trained on
_PROMPTS = (
    "Once upon a time",
    "Question: What is the capital of France?\nAnswer:",
    "Mia: Hello, Tom! How are you today?\nTom:",
    "Let us count to twelve:",
)


@dataclass(frozen=True)
class Recipe:
    """How to train. A batch is ``rows`` windows of the model's whole context."""

    rows: int
    minutes: float
    documents: int
    peak_rate: float = 3e-3
    final_share: float = 0.02
    warmup_share: float = 0.03
    weight_decay: float = 0.1

    def rate(self, passed: float) -> float:
        """Learning rate when the share ``passed`` of the time is gone: a short rise, then a cosine."""
        if passed < self.warmup_share:
            return self.peak_rate * max(passed / self.warmup_share, 0.01)
        turn = math.pi * (passed - self.warmup_share) / (1 - self.warmup_share)
        return self.peak_rate * (self.final_share + (1 - self.final_share) * (1 + math.cos(turn)) / 2)


def train(model: CausalLM, data: Packed, recipe: Recipe, device: torch.device) -> int:
    """Train ``model`` in place for the recipe's time; returns the number of steps."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda")
    loss_of = torch.compile(model.loss) if device.type == "cuda" else model.loss
    length = model.cos.shape[0] + 1
    step, begun, passed = 0, time.monotonic(), 0.0
    while passed < 1:
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(passed)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(data.windows(recipe.rows, length))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step:6d}  {passed:6.1%}  loss {loss.item():.4f}", flush=True)
        step += 1
        if step == 3:
            begun = time.monotonic()  # compilation is over
        passed = (time.monotonic() - begun) / (60 * recipe.minutes) if step >= 3 else 0.0
    return step


@torch.no_grad()
def evaluate(model: CausalLM, data: Packed, batches: int) -> float:
    """Mean loss in nats a token over random windows of ``data``."""
    torch.manual_seed(1)
    return sum(model.loss(data.windows(4, model.cos.shape[0] + 1)).item() for _ in range(batches)) / batches


def save(model: CausalLM, tokenizer: Tokenizer, shape: Shape, out: Path) -> None:
    """Write the checkpoint in Hugging Face's layout, weights as bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    token_ids: dict[str, object] = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        **token_ids,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    tokenizer_config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": shape.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", token_ids)
    _write_json(out / "tokenizer_config.json", tokenizer_config)


def verify(out: Path, shape: Shape) -> None:
    """Load what was saved with transformers, compare its logits with ours, and print what it writes."""
    from safetensors.torch import load_file
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    theirs = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    ours = CausalLM(shape)
    ours.load_state_dict(load_file(out / "model.safetensors"))
    with torch.no_grad():
        for prompt in _PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-3, rtol=1e-3)
            print("---", tokenizer.decode(_continue(ours, ids[0].tolist(), 200)), sep="\n", flush=True)


def _continue(model: CausalLM, ids: list[int], limit: int) -> list[int]:
    """``ids`` and what the model most likely writes after them, up to the end of the text."""
    for _ in range(limit):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
        if ids[-1] == EOS_ID:
            break
    return ids


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and make the checkpoint."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=3.0 if on_gpu else 60.0, help="time to train")
    parser.add_argument(
        "--documents", type=int, default=600_000 if on_gpu else 100_000, help="texts to write"
    )
    arguments = parser.parse_args()
    recipe = Recipe(64 if on_gpu else 2, arguments.minutes, arguments.documents)
    device = torch.device("cuda" if on_gpu else "cpu")
    shape = Shape()

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the worker processes are enough
    started = time.monotonic()
    tokenizer = learn((corpus.document(seed) for seed in range(20_000)), shape.vocab_size)
    window = shape.max_position_embeddings + 1
    data = pack(tokenizer, 0, recipe.documents, window)
    held_out = pack(tokenizer, _HELD_OUT, 1000, window)
    print(f"{len(data.ids):,} tokens in {recipe.documents:,} texts, {time.monotonic() - started:.0f} s")

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = CausalLM(shape).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, training on {device}", flush=True)
    steps = train(model, data.to(device), recipe, device)
    tokens = steps * recipe.rows * shape.max_position_embeddings
    save(model, tokenizer, shape, arguments.out)
    loss = evaluate(model, held_out.to(device), batches=20)
    print(f"{steps} steps, {tokens:,} tokens, held-out loss {loss:.4f}, {time.monotonic() - started:.0f} s")
    verify(arguments.out, shape)


if __name__ == "__main__":
    main()
