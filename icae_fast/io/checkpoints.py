"""Adapters on disk: this package's folders, and the key names that they share with the reference's checkpoints.

An adapter saved by either package loads in the other:

    icae.base_model.model.model.layers.N.self_attn.{q,v}_proj.lora_{A,B}.default.weight
    memory_token_embed.weight
    slot_gain                       (only with `slot_scale="embedding_norm"`, which the reference does not have)

A folder holds `adapter.safetensors` and `icae_config.json`. The first is complete by itself: the header, which is all
that the JSON file says, is in its metadata too. So a save over an older adapter takes effect in one rename. The JSON
file is for readers, editors and older versions of this package, and counts while it belongs to the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from icae_fast.config import ICAEConfig
from icae_fast.errors import BaseModelMismatchError, CheckpointError, ConfigError, NonFiniteError
from icae_fast.io.files import expanded, load_metadata, load_tensors, parse_json, tensor_bytes, write_atomically
from icae_fast.io.identity import base_identity, check_base, tensors_hash

if TYPE_CHECKING:
    from icae_fast.core.core import ICAECore

CONFIG_FILE = "icae_config.json"
TENSORS_FILE = "adapter.safetensors"
FORMAT_VERSION = 1
HEADER_KEY = "icae_config"  # of the header in the metadata of `TENSORS_FILE`

MEMORY_KEY = "memory_token_embed.weight"
GAIN_KEY = "slot_gain"
_LORA_KEY = re.compile(
    r"^icae\.base_model\.model\.model\.layers\.(\d+)\.self_attn\.([qv])_proj\.lora_([AB])(?:\.default)?\.weight$"
)
_BASE_KEY = re.compile(r"^(?:icae\.base_model\.model\.|decoder\.)(.+)$")


def lora_key(layer: int, projection: str, factor: str) -> str:
    """Return the reference's key of one LoRA factor, e.g. of factor "A" of projection "q" in layer 0."""
    return f"icae.base_model.model.model.layers.{layer}.self_attn.{projection}_proj.lora_{factor}.default.weight"


def reference_key(key: str) -> str:
    """Return the key in the form this package writes; older PEFT versions omit `.default`."""
    match = _LORA_KEY.match(key)
    return lora_key(int(match[1]), match[2], match[3]) if match else key


def split_reference_tensors(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], list[tuple[str, torch.Tensor]]]:
    """Split a checkpoint into the adapter's tensors and the base weights that it may contain.

    The reference's trainer saves the whole model, and its v1 file has zeros for LLaMA's weights.

    Returns:
        (adapter tensors under canonical keys, base weights under Hugging Face names). A base weight appears twice if
        the file has one for the encoder and one for the decoder. Unknown keys are among the adapter tensors, so that
        loading reports them.
    """
    adapter: dict[str, torch.Tensor] = {}
    base: list[tuple[str, torch.Tensor]] = []
    for key, tensor in tensors.items():
        name = reference_key(key)
        match = None if ".lora_" in name else _BASE_KEY.match(name)  # LoRA on other projections is unknown
        if match:
            base.append((match[1].replace(".base_layer.", "."), tensor))
        else:
            adapter[name] = tensor
    return adapter, base


def check_base_weights(model: nn.Module, base: Iterable[tuple[str, torch.Tensor]], path: str) -> None:
    """Raise if base weights in a checkpoint differ from the base model's; all-zero tensors are skipped.

    Args:
        model: the base model.
        base: (Hugging Face name, tensor) of the weights in the checkpoint.
        path: of the checkpoint, for the message.

    Raises:
        BaseModelMismatchError: a tensor differs, or the base model has none of this name.
    """
    own = model.state_dict()
    for name, tensor in base:
        if "rotary_emb" in name or not tensor.any():
            continue
        if name not in own:
            raise BaseModelMismatchError(f"{path} has the base weight {name}, which the base model does not have")
        mine = own[name]
        tensor = tensor[: mine.shape[0]]  # the reference appends rows for its special tokens
        same = tensor.shape == mine.shape
        if not same or not torch.allclose(tensor.to(mine).float(), mine.float(), rtol=1e-2, atol=1e-3):
            raise BaseModelMismatchError(
                f"{path} was trained with another base model: {name} differs; pass the base model it contains"
            )


def infer_sizes(tensors: Mapping[str, torch.Tensor], path: str) -> tuple[int, int]:
    """Return (memory size, LoRA rank) of a reference checkpoint, from the shapes of its tensors.

    Raises:
        CheckpointError: it has no memory embedding, no LoRA factor, or several ranks.
    """
    ranks = {t.shape[0] for key, t in tensors.items() if (m := _LORA_KEY.match(key)) and m[3] == "A" and t.dim() == 2}
    memory = tensors.get(MEMORY_KEY)
    if memory is None or memory.dim() != 2 or memory.shape[0] < 4 or not ranks:
        raise CheckpointError(
            f"{path} is no ICAE checkpoint: it needs {MEMORY_KEY} of k + 3 rows and LoRA factors such as "
            f"{lora_key(0, 'q', 'A')}; it has {len(tensors)} other tensors"
        )
    if len(ranks) > 1:
        raise CheckpointError(f"{path} mixes LoRA ranks {sorted(ranks)}; one rank for all layers is supported")
    return memory.shape[0] - 3, ranks.pop()


def reference_named_parameters(core: ICAECore) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (key in the reference's checkpoints, trained parameter)."""
    for layer, projection, factor, parameter in core.adapter.named_factors():
        yield lora_key(layer, projection, factor), parameter
    yield MEMORY_KEY, cast(nn.Parameter, core.memory_token_embed.weight)  # annotated as a Tensor
    if core.slot_gain is not None:
        yield GAIN_KEY, core.slot_gain


def adapter_hash(core: ICAECore) -> str:
    """Return 16 hex digits that identify the trained tensors."""
    return tensors_hash(reference_named_parameters(core))


def load_adapter_tensors(core: ICAECore, tensors: Mapping[str, torch.Tensor], path: str) -> None:
    """Copy an adapter's tensors into the module, either all or none.

    Args:
        core: the model.
        tensors: by the reference's keys.
        path: of the checkpoint, for messages.

    Raises:
        CheckpointError: keys are missing, unknown or misshaped; the message lists the first twelve.
        NonFiniteError: a tensor contains NaN or infinity.
    """
    own = dict(reference_named_parameters(core))
    problems = [f"missing {k}" for k in own if k not in tensors]
    problems += [f"unknown {k}" for k in tensors if k not in own]
    problems += [
        f"misshaped {k}: {tuple(tensors[k].shape)}, expected {tuple(p.shape)}"
        for k, p in own.items()
        if k in tensors and tensors[k].shape != p.shape
    ]
    problems += [
        f"{k} in {str(tensors[k].dtype).removeprefix('torch.')}"
        for k in own
        if k in tensors and not tensors[k].dtype.is_floating_point
    ]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise CheckpointError(f"{path} does not fit this base model and config: {shown}")
    for key in own:
        if not torch.isfinite(tensors[key]).all():
            raise NonFiniteError(f"{path}: {key} holds NaN or infinity; use an earlier checkpoint")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])


def save_adapter(core: ICAECore, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `adapter.safetensors` (trained tensors only, under the reference's keys) and `icae_config.json`.

    Args:
        folder: target folder, created if necessary.
        dtype: dtype of the tensors in the file; None for the fp32 in which they are held. bf16 halves the file and
            rounds as bf16 compute does anyway, but an adapter that is trained further should keep fp32.

    Raises:
        CheckpointError: the folder cannot be written; no half-written file stays.
    """
    tensors = {n: t if dtype is None else t.detach().to(dtype) for n, t in reference_named_parameters(core)}
    write_adapter(folder, core.config, base_identity(core.base_model), tensors)


def write_adapter(
    folder: str | Path, config: ICAEConfig, base: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write an adapter from its parts, e.g. when its weights are sharded; otherwise use `save_adapter`.

    Args:
        folder: the target folder, created if necessary.
        config: the adapter's config.
        base: from `base_identity`.
        tensors: in the order and under the keys of `ICAE.reference_named_parameters`.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    header = {
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "base": dict(base),
        "adapter_hash": tensors_hash(tensors.items()),
    }
    metadata = {"format": "pt", HEADER_KEY: json.dumps(header)}
    folder = expanded(folder)
    files = {
        folder / TENSORS_FILE: tensor_bytes(tensors, metadata),
        folder / CONFIG_FILE: (json.dumps(header, indent=2) + "\n").encode(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(files)
    except OSError as error:
        raise CheckpointError(f"cannot save the adapter in {folder}: {error}; free space or choose another") from error


@dataclass(frozen=True)
class SavedAdapter:
    """A saved adapter as it was at one time.

    Args:
        path: of the tensors' file, for messages.
        config: sizes and conventions.
        header: JSON values, among them `base`, and `adapter_hash`, which is None if another package saved the adapter.
        tensors: mapped from the file.
    """

    path: Path
    config: ICAEConfig
    header: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Return the adapter that a folder holds now; a save into it meanwhile changes nothing.

    Raises:
        CheckpointError: the folder has no adapter, a damaged one, one of a newer format version, or one whose tensors
            have other sizes than its config.
    """
    path = expanded(folder) / TENSORS_FILE
    tensors, metadata = load_tensors(path) if path.is_file() else (None, {})
    config, header = _header(path.parent, metadata)
    if tensors is None:
        raise CheckpointError(f"there is no file {path}; save or download the adapter again")
    found = infer_sizes(tensors, str(path))
    if found != (config.memory_size, config.lora_rank):
        raise CheckpointError(
            f"{path} has {found[0]} memory tokens and LoRA rank {found[1]}, and its config {config.memory_size} and "
            f"{config.lora_rank}; save or download the adapter again"
        )
    return SavedAdapter(path, config, header, tensors)


def read_header(folder: str | Path) -> tuple[ICAEConfig, dict[str, Any]]:
    """Return (config, header) of a saved adapter without its tensors; the header has `base` and `adapter_hash`.

    Raises:
        CheckpointError: the folder has no adapter, or one of a newer format version.
    """
    path = expanded(folder) / TENSORS_FILE
    return _header(path.parent, load_metadata(path) if path.is_file() else {})


def _header(folder: Path, metadata: Mapping[str, str]) -> tuple[ICAEConfig, dict[str, Any]]:
    """Return config and header from the JSON file, or from the tensors' metadata if the file belongs to others."""
    path, within = folder / CONFIG_FILE, metadata.get(HEADER_KEY)
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        if within is None:
            raise CheckpointError(f"{folder} holds no adapter: there is no {CONFIG_FILE}") from error
        return _parsed(within, folder / TENSORS_FILE)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); check its permissions") from error
    config, header = _parsed(text, path)
    if within is not None:
        # A save that was cut off between its two renames leaves the JSON file of the adapter before it.
        own = _parsed(within, folder / TENSORS_FILE)
        if own[1]["adapter_hash"] != header["adapter_hash"]:
            return own
    return config, header


def _parsed(text: str | bytes, path: Path) -> tuple[ICAEConfig, dict[str, Any]]:
    try:
        header = parse_json(text)
        version, config = header["format_version"], header["config"]
        for name, kind in (("base", dict), ("adapter_hash", str), ("config", dict), ("format_version", int)):
            if not isinstance(header[name], kind):
                raise TypeError(f"{name} is {type(header[name]).__name__}")
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged (it lacks {error}); save or download the adapter again") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); save or download the adapter again") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; install a newer icae-fast to read it")
    try:
        return ICAEConfig.from_dict(config), header
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_adapter(core: ICAECore, saved: SavedAdapter) -> None:
    """Load the tensors of a saved adapter into a model that has the adapter's config.

    Raises:
        BaseModelMismatchError: the model has a different base model.
        CheckpointError: the tensors were not saved together with the config file, or do not fit; see
            `load_adapter_tensors`.
    """
    check_base(core.base_model, saved.header["base"], str(saved.path.parent))
    load_adapter_tensors(core, saved.tensors, str(saved.path))
    if saved.header["adapter_hash"] not in (None, adapter_hash(core)):
        raise CheckpointError(
            f"{saved.path} is not the file that {CONFIG_FILE} was saved with; save or download the adapter again"
        )
