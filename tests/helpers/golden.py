"""Recorded results of the public reference on a tiny random LLaMA (see `tests/data/golden/README.md`)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[1] / "data" / "golden"
SETTINGS = json.loads((FOLDER / "config.json").read_text())
CASES = ("short", "exact", "three_spans")
DEVICE = "cpu"  # replaced by pytest's --device


def reference_checkpoint_path() -> Path:
    """Return the path of the reference's checkpoint with LoRA and memory embeddings."""
    return FOLDER / "icae.safetensors"


def load_base(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return the base model in evaluation mode."""
    model = LlamaForCausalLM(LlamaConfig(**SETTINGS["base"])).to(dtype)
    model.load_state_dict(load_file(FOLDER / "base.safetensors"))
    return model.eval().to(DEVICE)


def case(name: str) -> dict[str, torch.Tensor]:
    """Return the recorded tensors of one case, their names without its prefix."""
    tensors = load_file(FOLDER / "cases.safetensors")
    return {k.removeprefix(f"{name}."): v.to(DEVICE) for k, v in tensors.items() if k.startswith(f"{name}.")}
