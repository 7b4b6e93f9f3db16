"""Adapter folders that PEFT saves: read where their LoRA is the one of an ICAE, refused in a sentence otherwise.

PEFT saves the LoRA of `ICAE.icae` of the reference, under its keys without the prefix `icae.`. Memory tokens and
compression rate are not in such a folder, unless the tensors hold `memory_token_embed.weight` too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from icae_fast.config import ICAEConfig
from icae_fast.errors import CheckpointError, ConfigError
from icae_fast.io.checkpoints import CONFIG_FILE, MEMORY_KEY, TENSORS_FILE, SavedAdapter, infer_sizes, reference_key
from icae_fast.io.files import load_tensors, parse_json

PEFT_CONFIG_FILE, PEFT_TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"

# Fields that change nothing about what the LoRA computes. Any other field that is set is a variant of LoRA, perhaps of
# a later PEFT, that this package does not compute.
_NEUTRAL = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "task_type",
)  # fmt: skip
_NEEDED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others change the base model's weights too
}


def is_peft_folder(folder: Path) -> bool:
    """Return whether a folder has an adapter of PEFT and none of this package."""
    names = (CONFIG_FILE, TENSORS_FILE)
    return (folder / PEFT_CONFIG_FILE).is_file() and not any((folder / name).is_file() for name in names)


def read_peft_adapter(
    folder: Path, memory_tokens: torch.Tensor | None = None, compression_rate: int | None = None
) -> SavedAdapter:
    """Return the adapter in a folder that PEFT saved.

    Args:
        folder: the folder.
        memory_tokens: (k + 3, d) embeddings of the memory tokens, AE, LM and FT; None for those among the tensors.
        compression_rate: context tokens per slot; None for 4, the reference's.

    Raises:
        CheckpointError: the folder is damaged, its LoRA is none on q and v alone, or there are no memory tokens.
    """
    path = folder / PEFT_TENSORS_FILE
    fields = _fields(folder / PEFT_CONFIG_FILE)
    tensors = {_key(key): tensor for key, tensor in load_tensors(path)[0].items()}
    if memory_tokens is not None:
        tensors[MEMORY_KEY] = memory_tokens
    if MEMORY_KEY not in tensors:
        raise CheckpointError(
            f"{folder} is an adapter of PEFT, which holds no memory tokens; pass memory_tokens=, the (k + 3, d) "
            "embeddings of the memory tokens, AE, LM and FT, and compression_rate="
        )
    memory_size, rank = infer_sizes(tensors, str(path))
    if rank != fields["r"]:
        raise CheckpointError(f"{path} has LoRA rank {rank}, and its config {fields['r']!r}; save the adapter again")
    try:
        config = ICAEConfig(
            memory_size=memory_size, compression_rate=4 if compression_rate is None else compression_rate,
            lora_rank=rank, lora_alpha=fields["lora_alpha"], lora_dropout=fields.get("lora_dropout") or 0.0,
            base_model=fields.get("base_model_name_or_path"), base_revision=fields.get("revision"),
        )  # fmt: skip
    except ConfigError as error:
        raise CheckpointError(f"{folder / PEFT_CONFIG_FILE}: {error}") from error
    return SavedAdapter(path, config, {"base": {}, "adapter_hash": None}, tensors)


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = parse_json(path.read_bytes())
        targets = fields["target_modules"]
        fields["r"], fields["lora_alpha"]
    except KeyError as error:
        raise CheckpointError(f"{path} is damaged (it lacks {error}); save or download the adapter again") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); save or download the adapter again") from error
    known = {*_NEUTRAL, *_NEEDED, "r", "lora_alpha", "lora_dropout", "target_modules"}
    other = [f"{name}={fields[name]!r}" for name in sorted(fields.keys() - known) if fields[name]]
    other += [f"{name}={fields.get(name)!r}" for name, good in _NEEDED.items() if fields.get(name, good[0]) not in good]
    if not isinstance(targets, list) or sorted(map(str, targets)) != ["q_proj", "v_proj"]:
        other.append(f"target_modules={targets!r}")
    if other:
        shown = ", ".join(f"{text:.80}" for text in other[:5])
        raise CheckpointError(
            f"{path} has {shown}; an ICAE's adapter is plain LoRA on q_proj and v_proj of all layers, so train one of "
            "that kind"
        )
    return fields


def _key(key: str) -> str:
    return MEMORY_KEY if key.endswith(MEMORY_KEY) else reference_key(f"icae.{key}")
