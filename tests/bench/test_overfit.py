"""A new adapter overfits eight short passages: the loss nearly vanishes, and greedy restoration is then exact."""

import pytest
import torch

from bench.harness import overfit
from bench.harness.shapes import OverfitCase
from helpers import golden
from icae_fast import ICAE, ICAEConfig

CASE = OverfitCase("golden", "fp32", 8, 8, 16, warm_steps=20, max_steps=200, goal=0.05)


@pytest.fixture
def icae():
    """Return a new adapter on the golden base, with random weights scaled so that slots can steer its output."""
    base = golden.load_base()
    with torch.no_grad():
        for name, weight in base.named_parameters():
            if name.endswith("_proj.weight"):
                weight.mul_(2.5)  # unscaled, attention is nearly uniform
        base.lm_head.weight.mul_(5)  # unscaled, no hidden state makes a token likelier than 1 in 3
    config = ICAEConfig(
        memory_size=CASE.memory_size, compression_rate=1, lora_rank=32, lora_alpha=32, lora_dropout=0.0,
        memory_positions="spread", slot_scale="embedding_norm",
    )  # fmt: skip
    torch.manual_seed(overfit.SEED)
    return ICAE.from_base(base, config)


@pytest.mark.usefixtures("one_thread")
def test_eight_passages_are_memorised(icae):
    passages = overfit.passages_for(CASE, icae)
    learned = overfit.learn(CASE, icae, passages, learning_rate=1e-2)
    assert learned["losses"][0] > 1
    assert learned["losses"][-1] < CASE.goal
    assert learned["reached"]
    assert all(overfit.restored(icae, passages))
