"""The golden model with a tokenizer of words, texts for it, and a cache that can break off."""

import random

from helpers import golden
from icae_fast import ICAE


class Cache(dict):
    """Answers in memory; `interrupt_after` of them, the user presses Ctrl-C."""

    def __init__(self, interrupt_after=None):
        super().__init__()
        self.interrupt_after = interrupt_after

    def put(self, key, value):
        self[key] = value
        if len(self) == self.interrupt_after:
            raise KeyboardInterrupt


def golden_icae(tokenizer):
    """The golden adapter, k = 8 and rate 4."""
    return ICAE.from_reference_checkpoint(
        golden.reference_checkpoint_path(), golden.load_base(), tokenizer=tokenizer
    ).eval()


def words(n, seed):
    """A text of n words, each a token, over several lines."""
    rng = random.Random(seed)
    return "".join(f"w{rng.randrange(3, 90)}" + ("\n" if rng.random() < 0.1 else " ") for _ in range(n)).rstrip()
