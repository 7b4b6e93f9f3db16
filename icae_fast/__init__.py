"""icae_fast: fast kernels and a drop-in module for ICAE, the In-context Autoencoder (arXiv 2307.06945).

icae = ICAE.from_base(base_model, ICAEConfig(), tokenizer=tokenizer)
memories = icae.compress([text, other_text])
answers = icae.generate(memories[0], prompts=["What is it about?"])
"""

from icae_fast import errors
from icae_fast.config import ICAEConfig
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
