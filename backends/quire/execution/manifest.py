"""engine.json: what an engine is, what it needs, and what it may be asked for.

`quire build` writes it beside the engine; whoever loads the engine reads it first and refuses one that
does not fit. Unknown and missing fields are errors: the file is written by the same version that reads it.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from quire.errors import ManifestError

MANIFEST_VERSION = 3
DIGEST_PIECE_BYTES = 32 << 20
DIGEST_THREADS = 16

Runtime = Literal["openvino", "tensorrt", "torch"]
Precision = Literal["float32", "bf16", "fp16", "int8", "fp8", "int8-weights", "fp8-weights"]
KvCacheDtype = Literal["float32", "bf16", "fp16", "fp8"]

Positive = Annotated[int, msgspec.Meta(gt=0)]


class ModelDimensions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The shape of the decoder, as far as whoever drives it has to know."""

    architecture: str
    vocab_size: Positive
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    sliding_window: Positive | None = None


class EngineLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Upper limits that the engine was built for; serving limits may be lower."""

    max_num_seqs: Positive
    max_num_batched_tokens: Positive
    max_model_len: Positive


class PlanDetails(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What has to be known to drive a TensorRT plan."""

    max_blocks: Positive
    """Blocks of the largest pool that the plan can address, the null block included."""
    num_pools: Positive
    """Tensors that the pool is cut into: kv_cache.0 and so on."""
    blocks_per_pool: Positive
    """Blocks in each of them but the last, which may have fewer."""
    profiles: tuple[tuple[Positive, Positive], ...]
    """Fewest and most tokens of a step for each optimization profile, ascending and disjoint."""
    step_sizes: tuple[Positive, ...]
    """Numbers of tokens, ascending, that steps are padded to."""
    kernel_shared_bytes: Positive
    """Shared memory that a kernel of the plan may ask for."""
    gpu_architecture: Positive
    """Compute capability, 90 for 9.0."""
    gpu_name: str


class GateReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the numerics gate measured between engine and torch module; docs/precision.md defines it."""

    positions: int = 0
    """Rows of logits that were compared; 0 before the gate has run."""
    on_text: bool = False
    """Whether the tokens were a text's. On random ones what depends on the next token has no threshold."""
    scored_tokens: int = 0
    """Positions with a next token whose probability counts."""
    max_abs_logit_error: float = 0.0
    max_abs_probability_error: float = 0.0
    """Over all positions and tokens."""
    mean_abs_probability_error: float = 0.0
    """Of the token that comes next, over the scored tokens."""
    mean_kl_divergence: float = 0.0
    """In nats, of the engine from the reference, over all positions."""
    top1_agreement: float = 0.0
    """Share of positions with the same most probable token."""
    perplexity_ratio: float = 1.0
    """The engine's perplexity of the scored tokens over the reference's."""
    exceeded: tuple[str, ...] = ()
    """Measures beyond their threshold: empty unless publishing was forced."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of engine.json."""

    version: int
    model: ModelDimensions
    block_size: Positive
    """Tokens in one block of the KV pool."""
    limits: EngineLimits
    precision: Precision
    kv_cache_dtype: KvCacheDtype
    """Of the pool's elements; fp8 is e4m3 with scale 1."""
    runtime: Runtime
    runtime_version: str
    inputs: tuple[str, ...]
    """Names of the step tensors that the engine takes, in the order of the engine contract."""
    outputs: tuple[str, ...]
    kv_bytes_per_block: Positive
    """Bytes of the pool that one block takes over all layers, keys and values."""
    checkpoint_digest: str
    """SHA-256 over the checkpoint's files."""
    files: dict[str, str]
    """`file_digest` of each engine file, by its name beside engine.json."""
    gate: GateReport
    plan: PlanDetails | None = None
    """Of a TensorRT engine."""


def read_manifest(engine_dir: Path) -> Manifest:
    """Read `engine_dir`/engine.json.

    Raises:
        ManifestError: the file is missing, is not such a manifest, or is of another version.
    """
    path = engine_dir / "engine.json"
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise ManifestError(
            f"cannot read {path}: {error.strerror}; build the engine with `quire build`"
        ) from None
    except msgspec.DecodeError as error:
        raise ManifestError(
            f"{path} is damaged or of another version ({error}); build the engine again with `quire build`"
        ) from None
    if manifest.version != MANIFEST_VERSION:
        raise ManifestError(
            f"{path} has version {manifest.version}, this Quire reads version {MANIFEST_VERSION}; "
            "build the engine again with `quire build`"
        )
    return manifest


def write_manifest(manifest: Manifest, engine_dir: Path) -> None:
    """Write `engine_dir`/engine.json, readable by people too."""
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (engine_dir / "engine.json").write_bytes(text + b"\n")


def verify_files(manifest: Manifest, engine_dir: Path) -> None:
    """Check the digest of every file that the manifest lists.

    Raises:
        ManifestError: a file is missing or has changed since the build.
    """
    for name, expected in manifest.files.items():
        path = engine_dir / name
        if not path.is_file():
            raise ManifestError(f"{path} is missing; build the engine again with `quire build`")
        if file_digest(path) != expected:
            raise ManifestError(
                f"{path} has changed since it was built; build the engine again with `quire build`"
            )


def file_digest(path: Path) -> str:
    """SHA-256 over the SHA-256 of each piece of a file, in hexadecimal.

    Pieces are hashed side by side: with one after another, a plan would take longer to check than to load.
    """
    starts = range(0, max(1, path.stat().st_size), DIGEST_PIECE_BYTES)
    with path.open("rb") as file, ThreadPoolExecutor(DIGEST_THREADS) as threads:

        def digest(start: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), DIGEST_PIECE_BYTES, start)).digest()

        return hashlib.sha256(b"".join(threads.map(digest, starts))).hexdigest()
