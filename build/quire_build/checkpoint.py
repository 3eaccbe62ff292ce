"""A Hugging Face checkpoint directory: its files, its digest, its weights.

Opening reads JSON and safetensors headers only and needs no torch, so that an unchanged rebuild is quick;
weights are read by `load_decoder`. What config.json means is `decoder_config`'s business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from quire.errors import CheckpointError, UnsupportedModelError
from quire.execution.manifest import file_digest
from quire.serving.frontend.generation_defaults import GenerationDefaults
from quire.text.tokenizer import Tokenizer
from quire_build.decoder_config import DecoderConfig

if TYPE_CHECKING:
    from torch import Tensor

    from quire_build.decoder import Decoder

INDEX = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"
SERVING_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""What the frontends need of a checkpoint; all but config.json and tokenizer.json may be absent."""

_FLOAT_TYPES = frozenset({"F64", "F32", "F16", "BF16"})
_RECOMPUTED = "rotary_emb.inv_freq"
"""Ends the names of tensors that older checkpoints hold although config.json implies them."""
_NAMES_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files are all there and whole."""

    directory: Path
    config: DecoderConfig
    tensor_files: dict[str, str]
    """The shard that holds each tensor, by tensor name."""
    serving_files: tuple[str, ...]
    """Those of `SERVING_FILES` that are present."""
    digest: str
    """SHA-256 over the names and contents of all files that a build reads."""

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read and check everything but the weights themselves.

        Raises:
            CheckpointError: a file is missing, truncated or malformed; the message names it.
            UnsupportedModelError: the architecture or one of its options is not implemented.
        """
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory} is not a directory; checkpoints are folders of this machine, none is downloaded"
            )
        if not (directory / "config.json").exists():
            raise CheckpointError(f"{directory} is no Hugging Face checkpoint: it has no config.json")
        config = DecoderConfig.from_huggingface(_read_json(directory / "config.json"))
        # What serving would refuse is refused here.
        GenerationDefaults.from_directory(directory)
        Tokenizer.from_directory(directory)
        tensor_files = _locate_tensors(directory)
        serving_files = tuple(name for name in SERVING_FILES if (directory / name).is_file())
        index = (INDEX,) if (directory / INDEX).is_file() else ()
        return cls(
            directory=directory,
            config=config,
            tensor_files=tensor_files,
            serving_files=serving_files,
            digest=_digest(directory, {*serving_files, *index, *tensor_files.values()}),
        )


def load_decoder(checkpoint: Checkpoint, num_positions: int) -> Decoder:
    """The checkpoint as a float32 torch module that runs in place.

    Raises:
        CheckpointError: a tensor is missing, has another shape than config.json implies, or is none of the
            model that it describes.
        UnsupportedModelError: a tensor is stored in a type that is not a plain floating-point type.
    """
    import torch

    from quire_build.decoder import Decoder

    with torch.device("meta"):
        decoder = Decoder(checkpoint.config, num_positions)
    expected = decoder.state_dict()
    _check_all_are_read(checkpoint, expected)
    if checkpoint.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    weights = {name: _load_tensor(checkpoint, name, meta) for name, meta in expected.items()}
    decoder.load_state_dict(weights, strict=False, assign=True)
    if checkpoint.config.tie_word_embeddings:
        decoder.lm_head.weight = decoder.embed_tokens.weight
    return decoder.eval().requires_grad_(False)


def checkpoint_weights(checkpoint: Checkpoint, num_positions: int) -> Callable[[str], Tensor]:
    """The decoder's parameters and tables by name, each read when it is asked for, as float32.

    A tensor that nobody would ask for is refused at once; the function raises the rest of what
    `load_decoder` raises.
    """
    import torch

    from quire_build.decoder import Decoder
    from quire_build.rope import cosine_and_sine

    config = checkpoint.config
    with torch.device("meta"):
        expected = Decoder(config, num_positions).state_dict()
    _check_all_are_read(checkpoint, expected)
    cosine, sine = cosine_and_sine(config.rope, config.head_dim, num_positions)
    tables = {"cosine": cosine, "sine": sine}

    def weight(name: str) -> Tensor:
        if name in tables:
            return tables[name]
        if name == "lm_head.weight" and config.tie_word_embeddings:
            name = "embed_tokens.weight"
        return _load_tensor(checkpoint, name, expected[name])

    return weight


def _check_all_are_read(checkpoint: Checkpoint, parameters: Iterable[str]) -> None:
    """Refuse weights that config.json has no place for: without them it would be another model.

    A head that is tied to the embeddings is among the parameters, so that a checkpoint may hold it.
    """
    unread = checkpoint.tensor_files.keys() - {_tensor_name(parameter) for parameter in parameters}
    names = sorted(name for name in unread if not name.endswith(_RECOMPUTED))
    if names:
        shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
        raise CheckpointError(
            f"{checkpoint.directory} has tensors that config.json implies no place for, {len(names)} in all: "
            f"{shown}; config.json does not fit the weights, use the one that was saved with them"
        )


def _tensor_name(parameter: str) -> str:
    """What a checkpoint calls it: everything but the head lies under `model.`."""
    return parameter if parameter.startswith("lm_head.") else f"model.{parameter}"


def _load_tensor(checkpoint: Checkpoint, parameter: str, expected: Tensor) -> Tensor:
    """One tensor as float32."""
    name = _tensor_name(parameter)
    if name not in checkpoint.tensor_files:
        raise CheckpointError(f"{checkpoint.directory} has no tensor {name}")
    path = checkpoint.directory / checkpoint.tensor_files[name]
    with safe_open(path, framework="pt") as shard:
        header = shard.get_slice(name)
        if header.get_dtype() not in _FLOAT_TYPES:
            raise UnsupportedModelError(
                f"{path}: tensor {name} is stored as {header.get_dtype()}; "
                "quantised checkpoints are not supported"
            )
        if tuple(header.get_shape()) != tuple(expected.shape):
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(header.get_shape())}, "
                f"config.json implies {list(expected.shape)}"
            )
        tensor: Tensor = shard.get_tensor(name)
    return tensor.float()


def _locate_tensors(directory: Path) -> dict[str, str]:
    """The shard of every tensor, after opening every shard's header."""
    index = directory / INDEX
    if not index.exists():
        return dict.fromkeys(_tensor_names(directory / SINGLE_SHARD), SINGLE_SHARD)
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
    contents: dict[str, frozenset[str]] = {}
    for tensor, shard in weight_map.items():
        if Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: {shard!r}, the file of tensor {tensor}, is not a plain file name"
            )
        if shard not in contents:
            if not (directory / shard).is_file():
                raise CheckpointError(f"{directory / shard} is missing; it holds tensor {tensor}")
            contents[shard] = _tensor_names(directory / shard)
        if tensor not in contents[shard]:
            raise CheckpointError(f"{directory / shard} lacks tensor {tensor}, which {INDEX} promises there")
    return weight_map


def _tensor_names(path: Path) -> frozenset[str]:
    """Names of the tensors in one shard, after checking that the file is as long as its header says."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; weights are read from safetensors files only")
    try:
        with safe_open(path, framework="numpy") as shard:
            return frozenset(shard.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def _digest(directory: Path, names: set[str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name} {file_digest(directory / name)}\n".encode())
    return digest.hexdigest()
