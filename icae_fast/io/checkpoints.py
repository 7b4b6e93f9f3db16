"""Adapters on disk: this package's folders and the reference's checkpoint files.

Both use the reference's key names, so an adapter saved by either loads in the other:

    icae.base_model.model.model.layers.N.self_attn.{q,v}_proj.lora_{A,B}.default.weight
    memory_token_embed.weight
    slot_gain                       (only with `slot_scale="embedding_norm"`, which the reference does not have)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from icae_fast.config import ICAEConfig
from icae_fast.errors import BaseModelMismatchError, CheckpointError, ConfigError, NonFiniteError
from icae_fast.io.files import load_tensors, tensor_bytes, write_atomically
from icae_fast.io.identity import base_identity, check_base, tensors_hash

if TYPE_CHECKING:
    from icae_fast.core.core import ICAECore

CONFIG_FILE = "icae_config.json"
TENSORS_FILE = "adapter.safetensors"
FORMAT_VERSION = 1

MEMORY_KEY = "memory_token_embed.weight"
GAIN_KEY = "slot_gain"
_LORA_KEY = re.compile(
    r"^icae\.base_model\.model\.model\.layers\.(\d+)\.self_attn\.([qv])_proj\.lora_([AB])(?:\.default)?\.weight$"
)
_BASE_KEY = re.compile(r"^(?:icae\.base_model\.model\.|decoder\.)(.+)$")


def lora_key(layer: int, projection: str, factor: str) -> str:
    """Return the reference's key of one LoRA factor, e.g. of factor "A" of projection "q" in layer 0."""
    return f"icae.base_model.model.model.layers.{layer}.self_attn.{projection}_proj.lora_{factor}.default.weight"


def _canonical(key: str) -> str:
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
        name = _canonical(key)
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
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise CheckpointError(f"{path} does not fit this base model and config: {shown}")
    for key in own:
        if not torch.isfinite(tensors[key]).all():
            raise NonFiniteError(f"{path}: {key} holds NaN or infinity; use an earlier checkpoint")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])


def read_reference_file(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a reference checkpoint: v2 `.safetensors`, or v1 `.pt` read with `weights_only=True`.

    Raises:
        CheckpointError: the file is missing or truncated, or contains more than tensors.
    """
    if str(path).endswith(".safetensors"):
        return load_tensors(path)[0]
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}; check the path")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything: IndexError, KeyError, struct.error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} is truncated, or holds more than tensors ({reason}); download it again"
        ) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} is no dictionary of tensors; pass the checkpoint's state dict")
    return dict(tensors)


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
    folder = Path(folder)
    header = {
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "base": dict(base),
        "adapter_hash": tensors_hash(tensors.items()),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            {
                folder / TENSORS_FILE: tensor_bytes(tensors, {"format": "pt"}),
                folder / CONFIG_FILE: (json.dumps(header, indent=2) + "\n").encode(),
            }
        )
    except OSError as error:
        raise CheckpointError(f"cannot save the adapter in {folder}: {error}; free space or choose another") from error


def read_header(folder: str | Path) -> tuple[ICAEConfig, dict[str, Any]]:
    """Return (config, header) of a saved adapter; the header has `base` and `adapter_hash`.

    Raises:
        CheckpointError: the folder has no adapter, or one of a newer format version.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        header = json.loads(path.read_text())
        version, config = header["format_version"], header["config"]
        header["base"], header["adapter_hash"]
        if not (isinstance(version, int) and isinstance(config, dict) and isinstance(header["base"], dict)):
            raise TypeError("a field has the wrong type")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no adapter: there is no {CONFIG_FILE}") from error
    except (OSError, json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); save or download the adapter again") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}; install a newer icae-fast to read it")
    try:
        return ICAEConfig.from_dict(config), header
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_adapter(core: ICAECore, folder: str | Path, header: Mapping[str, Any]) -> None:
    """Load the tensors of a saved adapter into a model that has the adapter's config.

    Args:
        core: the model.
        folder: written by `save_adapter`.
        header: from `read_header`.

    Raises:
        BaseModelMismatchError: the model has a different base model.
        CheckpointError: the tensors were not saved together with the config file, or do not fit; see
            `load_adapter_tensors`.
    """
    check_base(core.base_model, header["base"], str(folder))
    path = Path(folder) / TENSORS_FILE
    tensors = load_tensors(path)[0]
    load_adapter_tensors(core, tensors, str(path))
    if adapter_hash(core) != header["adapter_hash"]:
        raise CheckpointError(f"{path} is not the file that {CONFIG_FILE} was saved with; save the adapter again")
