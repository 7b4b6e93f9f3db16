"""Fresh Python processes and calls of ops with sample inputs, for the tests of the C++ build."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from icae_fast.ops import REGISTRY

ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this Python in a fresh process, in `folder`, with the given environment variables added."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def make_inputs(op: str, name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the arguments of a named sample of an op's spec, on the CPU with seed 5."""
    sample = next(s for s in REGISTRY[op].samples if s.name == name)
    return sample.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(5))


def call(op: str, inputs: dict[str, Any]) -> Any:
    """Call an op through the dispatcher."""
    return getattr(torch.ops.icae_fast, op)(**inputs)


def int32(*values: int) -> torch.Tensor:
    """Return a 1-d int32 tensor."""
    return torch.tensor(values, dtype=torch.int32)
