"""Published figures of other models, with their sources, to compare measurements with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """Published figures.

    Args:
        what: the models, and how they were measured.
        figures: values by length or model.
        source: the publication.
    """

    what: str
    figures: dict[Any, Any]
    source: str


ICAE_BY_LENGTH = Published(
    "an ICAE of Llama-2-7b-chat with 128 slots",
    {100: 0.9967, 200: 0.9969, 300: 0.9974, 400: 0.9889, 500: 0.9654},
    "arXiv 2406.13618, its replication of ICAE",
)

PAPER_TABLE_6 = Published(
    "pretrained ICAEs, 512 tokens in 128 slots",
    {
        "Llama-7B": {"bleu": 0.991, "loss": 0.017, "ppl_text": 9.01, "ppl_slots": 9.50},
        "Llama-2-7B": {"bleu": 0.995, "loss": 0.009, "ppl_text": 8.81, "ppl_slots": 9.18},
        "Llama-2-13B": {"bleu": 0.998, "loss": 0.004, "ppl_text": 8.15, "ppl_slots": 8.45},
    },
    "arXiv 2307.06945, Table 6",
)
