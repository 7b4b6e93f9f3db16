"""icae_fast: fast kernels and a drop-in module for ICAE, the In-context Autoencoder (arXiv 2307.06945).

    icae = ICAE.from_base(base_model, ICAEConfig(), tokenizer=tokenizer)
    memories = icae.compress([text, other_text])
    answers = icae.generate(memories[0], prompts=["What is it about?"])

Names are loaded on first use, so that `import icae_fast` and `icae-fast --help` do not import torch. Where torch is
imported already, `import icae_fast` also registers the ops, so that `torch.ops.icae_fast` has them.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from icae_fast import errors
from icae_fast.config import ICAEConfig

if TYPE_CHECKING:
    from icae_fast.core.memory import Memory, SlotKV
    from icae_fast.generation.answers import Answer
    from icae_fast.generation.writing import TextPiece
    from icae_fast.model.icae import ICAE
    from icae_fast.ops import backend_of, set_attention_backend
    from icae_fast.step.budget import ActivationBudget
    from icae_fast.store.provenance import Origin
    from icae_fast.store.store import MemoryStore

__version__ = "0.1.0"
__all__ = [
    "ICAE",
    "ActivationBudget",
    "Answer",
    "ICAEConfig",
    "Memory",
    "MemoryStore",
    "Origin",
    "SlotKV",
    "TextPiece",
    "__version__",
    "backend_of",
    "errors",
    "set_attention_backend",
]

# The same names as under TYPE_CHECKING above, by module.
_LAZY = {
    "ICAE": "icae_fast.model.icae",
    "ActivationBudget": "icae_fast.step.budget",
    "Answer": "icae_fast.generation.answers",
    "Memory": "icae_fast.core.memory",
    "MemoryStore": "icae_fast.store.store",
    "Origin": "icae_fast.store.provenance",
    "SlotKV": "icae_fast.core.memory",
    "TextPiece": "icae_fast.generation.writing",
    "backend_of": "icae_fast.ops",
    "set_attention_backend": "icae_fast.ops",
}


if not TYPE_CHECKING:  # a type checker that sees this function would accept any name

    def __getattr__(name: str) -> Any:
        """Import a public name on first use (PEP 562)."""
        module = _LAZY.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(module), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    importlib.import_module("icae_fast.ops")
