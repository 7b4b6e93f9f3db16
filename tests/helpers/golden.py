"""What the public reference computes on a tiny random LLaMA; `tests/data/golden/README.md` says how it was recorded."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[1] / "data" / "golden"
SETTINGS = json.loads((FOLDER / "config.json").read_text())
CASES = ("short", "exact", "three_spans")
DEVICE = "cpu"  # pytest's --device sets another


def reference_checkpoint_path() -> Path:
    """The reference's own checkpoint of LoRA and memory embeddings."""
    return FOLDER / "icae.safetensors"


def load_base(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The base model."""
    model = LlamaForCausalLM(LlamaConfig(**SETTINGS["base"])).to(dtype)
    model.load_state_dict(load_file(FOLDER / "base.safetensors"))
    return model.eval().to(DEVICE)


def case(name: str) -> dict[str, torch.Tensor]:
    """The recorded tensors of one case, without its prefix."""
    tensors = load_file(FOLDER / "cases.safetensors")
    return {k.removeprefix(f"{name}."): v.to(DEVICE) for k, v in tensors.items() if k.startswith(f"{name}.")}
