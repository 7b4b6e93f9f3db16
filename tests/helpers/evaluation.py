"""The golden model with a word tokenizer, texts for it, and a cache that can simulate Ctrl-C."""

import random

from helpers import golden
from icae_fast import ICAE


class Cache(dict):
    """An in-memory cache of answers that raises KeyboardInterrupt after `interrupt_after` entries."""

    def __init__(self, interrupt_after=None):
        super().__init__()
        self.interrupt_after = interrupt_after

    def put(self, key, value):
        self[key] = value
        if len(self) == self.interrupt_after:
            raise KeyboardInterrupt


def golden_icae(tokenizer):
    """Return the golden adapter with a tokenizer, k = 8 and rate 4."""
    return ICAE.from_reference_checkpoint(
        golden.reference_checkpoint_path(), golden.load_base(), tokenizer=tokenizer
    ).eval()


def words(n, seed):
    """Return a text of n words over several lines; each word is one token."""
    rng = random.Random(seed)
    return "".join(f"w{rng.randrange(3, 90)}" + ("\n" if rng.random() < 0.1 else " ") for _ in range(n)).rstrip()
